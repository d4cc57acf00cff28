"""Decoders of all families on the compiled CPU kernels, with quantised weights multiplied as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, groupby

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionBackend
from engine.attention.native_cpu import NativeAttention
from engine.batch import ForwardBatch, ForwardOutput
from engine.models.config import Experts, ModelSpec
from engine.models.decoder import HeadSlab, RotaryEmbedding, rotary_tables
from engine.models.eagle3_config import Eagle3Config
from engine.models.weights import WeightSource
from kernels.native import BF16_FORMAT, MatrixPart, PackedMatrix, ReadRows, Team, linear, packed_format
from kernels.native_decoder import Decoder, LayerWeights, PassOutputs, unpack_rows
from kernels.native_experts import MixtureWeights


def unsupported_shape(spec: ModelSpec) -> str | None:
    """Why the kernels cannot run this model; None where they can."""
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        if getattr(spec, name) % 32:
            return f"{name} {getattr(spec, name)} is not a multiple of 32"
    odd = {layer.rope.dim for layer in spec.layers if layer.rope is not None and layer.rope.dim % 32}
    return f"of each head {min(odd)} dimensions turn, which is not a multiple of 32" if odd else None


def gate_up_rows(intermediate_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where rows of gate and of up go: groups of 16 in turn, so that one work item has what SwiGLU multiplies."""
    rows = np.arange(intermediate_size)
    gate_rows = rows // 16 * 32 + rows % 16
    return gate_rows, gate_rows + 16


def make_decoder(
    team: Team, shape: ModelSpec | Eagle3Config, layers: Sequence[LayerWeights], target: ModelSpec
) -> Decoder:
    """The compiled stack of these layers: the target's own, or a draft's for it, which shares its embedding."""
    return Decoder(
        team,
        hidden=shape.hidden_size,
        intermediate=shape.intermediate_size,
        heads=shape.num_heads,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        norm_eps=shape.rms_norm_eps,
        layers=layers,
        gate=shape.activation if isinstance(shape, ModelSpec) else "silu",
        attention_scale=shape.attention_scale if isinstance(shape, ModelSpec) else None,
        embedding_scale=target.embedding_scale,
    )


def cos_sin(rotary: RotaryEmbedding) -> torch.Tensor:
    """Its tables as the kernels read them: [max_positions, rope.dim] float32, cosines, then sines."""
    return torch.cat((rotary.cos, rotary.sin), dim=1)


Rows = Callable[[torch.Tensor], torch.Tensor]
_DIGITS_OF_LAST_LAYER = 2
"""What the last layer rounds goes straight into the logits (docs/decisions/004-integer-products.md)."""


class NativeDecoder:
    """Same interface and mathematics as ``engine.models.decoder.TorchDecoder``.

    Products take bf16 activations and the file's own weights and accumulate in float32; the residual stream is
    float32. ``attention`` must be a ``NativeAttention`` of the same ``team``.
    """

    def __init__(self, source: WeightSource, spec: ModelSpec, team: Team, max_model_len: int, digits: int = 2) -> None:
        self.spec, self._team = spec, team
        self._pack = pack = _Packer(source, spec, digits)
        self.embedding = pack.matrix("model.embed_tokens.weight")
        self.head = self.embedding if spec.tie_word_embeddings else pack.matrix("lm_head.weight")
        self._logits = torch.empty(0, spec.vocab_size)
        self._norm = source.dequantized("model.norm.weight")
        rotary = rotary_tables(spec.layers, max_model_len, torch.device("cpu"))
        tables = {table: cos_sin(table) for table in rotary if table is not None}
        last = _Packer(source, spec, _DIGITS_OF_LAST_LAYER)
        layers = [
            (last if index == spec.num_layers - 1 else pack).layer(index, None if table is None else tables[table])
            for index, table in enumerate(rotary)
        ]
        self._decoder = make_decoder(team, spec, layers, target=spec)
        matrices = [matrix for layer in layers for matrix in layer.matrices]
        tied = self.head is self.embedding
        self.weight_bytes = sum(m.num_bytes for m in (*matrices, self.head, *(() if tied else (self.embedding,))))

    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        """As ``TorchDecoder``; hidden states and features are bf16."""
        assert isinstance(attention, NativeAttention)
        attention.plan(batch)
        residual = self.embed(batch.token_ids)
        outputs = PassOutputs(len(residual), self._norm, torch.tensor(capture, dtype=torch.int32))
        self._decoder.forward(attention.batch, attention.cache, residual, outputs=outputs)
        return ForwardOutput(outputs.hidden, outputs.features if capture else None)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, scaled where the family does: [T] int32 → [T, hidden] float32."""
        return self._decoder.embed(self.embedding, token_ids)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, hidden] bf16 → [L, vocab] float32, valid until the next call.

        The memory is used again: fresh pages for megabytes of logits cost more than the product itself.
        """
        if len(hidden) > len(self._logits):
            self._logits = torch.empty(len(hidden), self.spec.vocab_size)
        return linear(self._team, self.head, hidden, self._logits[: len(hidden)])

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        """``compute_logits`` for these tokens only: their rows of the head, packed together; None for all."""
        if token_ids is None:
            return HeadSlab(self.compute_logits, 0, packed=self.head)
        name = "model.embed_tokens.weight" if self.spec.tie_word_embeddings else "lm_head.weight"
        rows = self._pack.selected(name, token_ids, self.head_rows)
        return HeadSlab(lambda hidden: linear(self._team, rows, hidden), rows.num_bytes, packed=rows)

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the output projection: [n] int32 → [n, hidden] float32."""
        return unpack_rows(self._team, self.head, token_ids)


class _Packer:
    """Packs a model's matrices in the precision they have in the file, or as bf16."""

    def __init__(self, source: WeightSource, spec: ModelSpec, digits: int) -> None:
        self._source, self._spec, self._digits = source, spec, digits
        self._shapes = spec.tensor_shapes()

    def matrix(self, *names: str) -> PackedMatrix:
        """Weights of one storage format one below the other, with their biases where they have them."""
        starts = accumulate((self._shapes[name][0] for name in names), initial=0)
        rows = [np.arange(start, start + self._shapes[name][0]) for name, start in zip(names, starts, strict=False)]
        biases = [name.removesuffix("weight") + "bias" for name in names]
        bias = torch.cat([self._source.dequantized(b) for b in biases]) if biases[0] in self._shapes else None
        return self._pack(names, rows, bias)

    def selected(self, name: str, token_ids: torch.Tensor, packed: Rows) -> PackedMatrix:
        """Some rows of one matrix, in the order given; ``packed`` gives those of the whole packed one as float32."""
        tensor, row_map = self._source.quantized(name), np.arange(len(token_ids))
        if tensor is None or self._format(name) == BF16_FORMAT:
            part = MatrixPart(row_map, values=packed(token_ids.int()))
        else:
            part = MatrixPart(row_map, int(tensor.type), blocks=tensor.blocks(token_ids.numpy()))
        return PackedMatrix(len(token_ids), self._shapes[name][1], [part], None, self._digits)

    def layer(self, index: int, tables: torch.Tensor | None) -> LayerWeights:
        """A layer with the tables of its rotary embedding, which are [max_positions, rope.dim]."""
        spec, prefix = self._spec, f"model.layers.{index}."
        qkv = [f"{prefix}self_attn.{letter}_proj.weight" for letter in "qkv"]

        def norm(name: str, exists: bool) -> torch.Tensor | None:
            return self._source.dequantized(f"{prefix}{name}.weight") if exists else None

        return LayerWeights(
            qkv=[self.matrix(*names) for _, names in groupby(qkv, key=self._format)],
            output=self.matrix(prefix + "self_attn.o_proj.weight"),
            mlp=self._mlp(prefix + "mlp.") if spec.experts is None else self._mixture(prefix + "mlp.", spec.experts),
            input_norm=self._source.dequantized(f"{prefix}input_layernorm.weight"),
            mlp_norm=self._source.dequantized(f"{prefix}{spec.mlp_norm}.weight"),
            cos_sin=tables,
            q_norm=norm("self_attn.q_norm", spec.qk_norm),
            k_norm=norm("self_attn.k_norm", spec.qk_norm),
            attention_norm=norm("post_attention_layernorm", spec.output_norms),
            output_norm=norm("post_feedforward_layernorm", spec.output_norms),
            sinks=self._source.dequantized(f"{prefix}self_attn.sinks.weight") if spec.attention_sinks else None,
            window=spec.layers[index].sliding_window,
        )

    def _mlp(self, prefix: str) -> tuple[PackedMatrix, PackedMatrix]:
        rows, names = gate_up_rows(self._spec.intermediate_size), [prefix + "gate_proj.", prefix + "up_proj."]
        bias = None
        if names[0] + "bias" in self._shapes:
            bias = torch.empty(2 * self._spec.intermediate_size)
            for places, name in zip(rows, names, strict=True):
                bias[torch.from_numpy(places)] = self._source.dequantized(name + "bias")
        gate_up = self._pack([name + "weight" for name in names], rows, bias)
        return gate_up, self.matrix(prefix + "down_proj.weight")

    def _mixture(self, prefix: str, experts: Experts) -> MixtureWeights:
        router = self._source.dequantized(prefix + "gate.weight")
        bias = self._source.dequantized(prefix + "gate.bias") if experts.bias else None
        mlps = [self._mlp(f"{prefix}experts.{index}.") for index in range(experts.count)]
        return MixtureWeights(router, mlps, experts.per_token, experts.normalized, bias)

    def _pack(
        self, names: Sequence[str], rows: Sequence[npt.NDArray[np.int64]], bias: torch.Tensor | None
    ) -> PackedMatrix:
        keep = len({self._format(name) for name in names}) == 1
        parts = [self._part(name, row_map, keep) for name, row_map in zip(names, rows, strict=True)]
        return PackedMatrix(sum(map(len, rows)), self._shapes[names[0]][1], parts, bias, self._digits)

    def _part(self, name: str, row_map: npt.NDArray[np.int64], keep: bool) -> MatrixPart:
        tensor = self._source.quantized(name)
        if keep and tensor is not None and self._format(name) != BF16_FORMAT:
            return MatrixPart(row_map, int(tensor.type), blocks=ReadRows(tensor.blocks))
        return MatrixPart(row_map, values=ReadRows(partial(self._source.dequantized, name)))

    def _format(self, name: str) -> int:
        """The packed format that holds the tensor exactly; bf16 for floats and where there is none."""
        tensor = self._source.quantized(name)
        return BF16_FORMAT if tensor is None else packed_format(int(tensor.type))
