"""ctypes bindings of the compiled decoder stack and its paged attention (kernels/csrc/decoder.h, attention.h)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evospec.kernels.batched_lora import NativeLora
from evospec.kernels.huge_pages import huge_zeros
from evospec.kernels.native import MatrixStruct, PackedMatrix, Team, address, integers, load_library, pointers
from evospec.kernels.native_experts import ExpertsStruct, MixtureWeights


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", MatrixStruct * 3),
        *integers("num_qkv"),
        *((name, MatrixStruct) for name in ("output", "gate_up", "down")),
        *pointers("input_norm", "mlp_norm", "embedding_norm", "q_norm", "k_norm", "attention_norm", "output_norm"),
        *pointers("sinks", "cos_sin"),
        *integers("rotary_dim", "window", "norms_residual"),
        ("experts", ExpertsStruct),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *integers("hidden", "intermediate", "heads", "kv_heads", "head_dim", "gate"),
        *((name, ctypes.c_float) for name in ("norm_eps", "attention_scale", "embedding_scale")),
    )


class _Kv(ctypes.Structure):
    _fields_ = (*pointers("keys", "values"), *integers("block_size"), ("layer_stride", ctypes.c_size_t))


class _PassOutputs(ctypes.Structure):
    _fields_ = (*pointers("norm_weight", "hidden", "captured"), *integers("num_captured"), *pointers("features"))


class _WantedRows(ctypes.Structure):
    _fields_ = (*pointers("rows"), *integers("count"))


class _Batch(ctypes.Structure):
    _fields_ = (
        *integers("num_tokens", "num_sequences", "max_blocks"),
        *pointers("positions", "query_start", "seq_lens", "block_tables", "slots"),
        *integers("num_prefilling"),
    )


GATES = {"silu": 2, "gelu_tanh": 3, "swiglu_oai": 4}
"""Of the MLP, as ``Epilogue`` in kernels/csrc/linear.h."""


class KvCache:
    """Paged bf16 keys and values of all layers, in the layout of kernels/csrc/attention.h."""

    def __init__(self, num_layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> None:
        self.layer_elements = num_blocks * kv_heads * block_size * head_dim
        self._memory = huge_zeros(2 * num_layers * self.layer_elements * 2).view(torch.bfloat16)
        keys, values = self._memory.chunk(2)
        self.struct = _Kv(address(keys), address(values), block_size, self.layer_elements)


class BatchView:
    """A step's ragged batch (fields of engine/batch.py, int32) as the kernels read it; keeps the tensors alive."""

    def __init__(
        self,
        positions: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        slot_mapping: torch.Tensor,
        num_prefilling: int = 0,
    ) -> None:
        self._tensors = (positions, query_start_loc, seq_lens, block_tables, slot_mapping)
        if any(t.dtype != torch.int32 or not t.is_contiguous() for t in self._tensors):
            raise ValueError("batch tensors must be contiguous int32")
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        self.struct = _Batch(positions.shape[0], *block_tables.shape, *addresses, num_prefilling)


def paged_attention(
    team: Team,
    batch: BatchView,
    cache: KvCache,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write k, v [T, kv_heads, dim] into the cache, then attend with q [T, heads, dim]; float32 in and out.

    Products of queries and keys are multiplied with ``scale``. A token attends to the last ``window`` ones, itself
    included; None: to all before it. ``sinks`` [heads]: the score of one more key, whose value is zero.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # named: the copies must outlive the call
    sinks = None if sinks is None else sinks.float().contiguous()
    out = torch.empty_like(q)
    load_library().evo_attention(
        team.handle,
        ctypes.byref(batch.struct),
        ctypes.byref(cache.struct),
        layer,
        *(q.shape[1], k.shape[1], q.shape[2], ctypes.c_float(scale), window or 0),
        *(address(tensor) for tensor in (sinks, q, k, v, out)),
    )
    return out


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. ``qkv``: one matrix for each run of equal storage formats among q, k and v, in order.

    ``gate_up`` has its rows in alternating groups of 16 (gate, up); norms are float32 [hidden], those of queries and
    keys [head_dim]. With an ``embedding_norm`` (EAGLE-3) the input of ``qkv`` is [2 * hidden]: the token's normalised
    embedding, then the normalised residual stream.

    ``cos_sin`` is float32 [max_positions, rotary_dim]: cosines of the rotary angles, then sines; None: no rotary
    embedding. ``window``: how many tokens are attended to, the token itself included; None: all.
    """

    qkv: Sequence[PackedMatrix]
    output: PackedMatrix
    mlp: tuple[PackedMatrix, PackedMatrix] | MixtureWeights
    """gate_up and down"""
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    cos_sin: torch.Tensor | None
    embedding_norm: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    attention_norm: torch.Tensor | None = None
    """Of what attention adds to the residual stream"""
    output_norm: torch.Tensor | None = None
    """Of what the MLP adds"""
    sinks: torch.Tensor | None = None
    """[heads]: for each the score of one more key, whose value is zero"""
    window: int | None = None
    norms_residual: bool = False
    """Whether the input norm changes the residual stream, too (EAGLE-3 with ``norm_before_residual``)"""

    @property
    def matrices(self) -> list[PackedMatrix]:
        """All of them."""
        mlp = self.mlp.matrices if isinstance(self.mlp, MixtureWeights) else self.mlp
        return [*self.qkv, self.output, *mlp]


class PassOutputs:
    """What a pass over T tokens leaves behind besides the residual stream, all bf16.

    Args:
        num_tokens: T.
        norm: weight of the final norm, float32 [hidden].
        captured: C layers, ascending, whose output is wanted.
    """

    def __init__(self, num_tokens: int, norm: torch.Tensor, captured: Sequence[int]) -> None:
        hidden, layers = norm.shape[0], array("i", captured)
        self.hidden = torch.empty(num_tokens, hidden, dtype=torch.bfloat16)
        """[T, hidden] after the final norm"""
        self.features = torch.empty(num_tokens, len(layers) * hidden, dtype=torch.bfloat16)
        """[T, C * hidden]: outputs of the captured layers side by side"""
        self._inputs = norm, layers  # alive as long as their addresses are used
        places = norm.data_ptr(), self.hidden.data_ptr(), layers.buffer_info()[0]
        self.struct = _PassOutputs(*places, len(layers), self.features.data_ptr())


class Decoder:
    """The decoder stack: embedding lookup, layers, final norm. The residual stream is float32 [T, hidden].

    ``gate``: what the MLP does with its gate, one of ``GATES``.
    """

    def __init__(
        self,
        team: Team,
        *,
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        norm_eps: float,
        layers: Sequence[LayerWeights],
        gate: str = "silu",
        attention_scale: float | None = None,
        embedding_scale: float = 1.0,
    ) -> None:
        self._hidden, self._team, self._layers = hidden, team, layers
        scale = head_dim**-0.5 if attention_scale is None else attention_scale
        sizes = (hidden, intermediate, heads, kv_heads, head_dim, GATES[gate])
        shape = _Shape(*sizes, norm_eps, scale, embedding_scale)
        library = load_library()
        self.handle = ctypes.c_void_p(library.evo_decoder_new(team.handle, ctypes.byref(shape)))
        for layer in layers:
            library.evo_decoder_add_layer(self.handle, ctypes.byref(_layer_struct(layer)))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            load_library().evo_decoder_free(self.handle)

    def embed(self, table: PackedMatrix, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, scaled: token_ids [T] int32 → [T, hidden] float32."""
        count = token_ids.shape[0]
        residual = torch.empty(count, self._hidden)
        load_library().evo_decoder_embed(
            self.handle, ctypes.byref(table.struct), address(token_ids), count, address(residual)
        )
        return residual

    def forward(
        self,
        batch: BatchView,
        cache: KvCache,
        residual: torch.Tensor,
        embeddings: torch.Tensor | None = None,
        lora: NativeLora | None = None,
        wanted: torch.Tensor | None = None,
        outputs: PassOutputs | None = None,
    ) -> None:
        """Run all layers on the residual stream, in place.

        For a draft layer: embeddings like it, what its products gain, and the rows whose result is wanted, int32,
        ascending, of each sequence its last; their results are then the first rows of the stream, and of the other rows
        there are keys and values alone. None: all rows.
        """
        load_library().evo_decoder_forward(
            self.handle,
            ctypes.byref(batch.struct),
            ctypes.byref(cache.struct),
            *(address(embeddings), None if lora is None else lora.pointer),
            None if wanted is None else ctypes.byref(_WantedRows(address(wanted), len(wanted))),
            address(residual),
            ctypes.byref(_PassOutputs() if outputs is None else outputs.struct),
        )

    def final_norm(self, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """RMS norm: [T, hidden] float32 → bf16."""
        out = torch.empty(residual.shape, dtype=torch.bfloat16)
        load_library().evo_decoder_final_norm(
            self.handle, address(weight), address(residual), len(residual), address(out)
        )
        return out


def unpack_rows(team: Team, table: PackedMatrix, row_ids: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix: row_ids [n] int32 → [n, k] float32."""
    count = row_ids.shape[0]
    out = torch.empty(count, table.k)
    load_library().evo_unpack_rows(team.handle, ctypes.byref(table.struct), address(row_ids), count, address(out))
    return out


def _layer_struct(layer: LayerWeights) -> _Layer:
    norms = (layer.input_norm, layer.mlp_norm, layer.embedding_norm, layer.q_norm, layer.k_norm)
    if isinstance(layer.mlp, MixtureWeights):
        mlp, experts = (MatrixStruct(), MatrixStruct()), layer.mlp.struct
    else:
        mlp, experts = (layer.mlp[0].struct, layer.mlp[1].struct), ExpertsStruct()
    return _Layer(
        *((MatrixStruct * 3)(*(matrix.struct for matrix in layer.qkv)), len(layer.qkv)),
        *(layer.output.struct, *mlp),
        *map(address, (*norms, layer.attention_norm, layer.output_norm, layer.sinks, layer.cos_sin)),
        *(0 if layer.cos_sin is None else layer.cos_sin.shape[1], layer.window or 0, layer.norms_residual),
        experts,
    )
