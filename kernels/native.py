"""ctypes bindings of the compiled CPU kernels (kernels/csrc): packed weights, decoder stack, paged attention.

All buffers are torch tensors owned by the Python objects here; the library only sees their addresses.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kernels.targets import TARGETS, best_target

if TYPE_CHECKING:
    from kernels.native_lora import NativeLora

BF16_FORMAT = 0
"""Number of the packed format that holds floating-point weights."""
_GROUP_PAIR = 32
"""Weight rows are stored in pairs of 16-column groups."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _Matrix * 3),
        ("num_qkv", ctypes.c_int),
        ("output", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("embedding_norm", ctypes.c_void_p),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim")),
        ("norm_eps", ctypes.c_float),
    )


class _Kv(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("block_size", ctypes.c_int),
        ("layer_stride", ctypes.c_size_t),
    )


class _PassOutputs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm_weight", "hidden", "captured")),
        ("num_captured", ctypes.c_int),
        ("features", ctypes.c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("num_tokens", "num_sequences", "max_blocks")),
        *((name, ctypes.c_void_p) for name in ("positions", "query_start", "seq_lens", "block_tables", "slots")),
    )


def unsupported_reason() -> str | None:
    """Why the compiled kernels cannot be used in this process; None where they can."""
    target = best_target()
    if target is None:
        return f"the CPU lacks {', '.join(TARGETS[-1].missing)}"
    return None if target.library.exists() else f"{target.library.name} is not built (python -m kernels.build)"


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library; check ``unsupported_reason`` first."""
    target = best_target()
    assert target is not None, unsupported_reason()
    library = ctypes.CDLL(str(target.library))
    library.evo_find_processor()
    library.evo_block_bytes.restype = ctypes.c_size_t
    for name in ("evo_team_new", "evo_decoder_new"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's data begin, as an argument of the library (null for None)."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Team:
    """The threads that run the kernels; the calling thread is one of them. Not for concurrent use."""

    def __init__(self, num_threads: int) -> None:
        reason = unsupported_reason()
        if reason is not None:
            raise RuntimeError(f"native kernels: {reason}")
        self.handle = ctypes.c_void_p(load_library().evo_team_new(num_threads))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            load_library().evo_team_free(self.handle)


def packed_format(ggml_type: int) -> int:
    """The packed format that holds a GGUF type exactly; bf16 where there is none."""
    packed = int(load_library().evo_packed_format(ggml_type))
    return BF16_FORMAT if packed < 0 else packed


@dataclass(frozen=True)
class MatrixPart:
    """Rows of a weight matrix, and ``row_map`` [rows]: where each goes in the packed one.

    Exactly one of ``blocks`` (GGUF blocks, uint8 [rows, bytes], of ggml type ``ggml_type``) and ``values``
    (float32 [rows, k], stored as bf16) is given.
    """

    row_map: npt.NDArray[np.integer]
    ggml_type: int | None = None
    blocks: npt.NDArray[np.uint8] | None = None
    values: torch.Tensor | None = None

    @property
    def format(self) -> int:
        return BF16_FORMAT if self.ggml_type is None else packed_format(self.ggml_type)


class PackedMatrix:
    """A weight [n, k] in the layout of kernels/csrc/matrix.h, in the precision of its source.

    Args:
        n, k: shape; k a multiple of 32.
        parts: together all n rows, all of one packed format.
        bias: float32 [n], or None.
    """

    def __init__(self, n: int, k: int, parts: Sequence[MatrixPart], bias: torch.Tensor | None = None) -> None:
        formats = {part.format for part in parts}
        if len(formats) != 1 or k % 32:
            raise ValueError(f"cannot pack: formats {formats}, k = {k}")
        self.n, self.k, self.format = n, k, formats.pop()
        padded = -(-n // _GROUP_PAIR) * _GROUP_PAIR
        self.num_bytes = padded // 16 * (k // 32) * load_library().evo_block_bytes(self.format)
        self._memory = _huge_zeros(self.num_bytes)
        self._bias = None if bias is None else torch.nn.functional.pad(bias.float(), (0, padded - n))
        self._pack(parts)
        self.struct = _Matrix(self.format, n, k, self._memory.data_ptr(), address(self._bias))

    def repack(self, parts: Sequence[MatrixPart]) -> None:
        """Put another weight of the same shape and format in place; ``parts`` as at first."""
        if {part.format for part in parts} != {self.format}:
            raise ValueError(f"not of format {self.format}")
        self._memory.zero_()  # codes of less than eight bits are added to what is there
        self._pack(parts)

    def _pack(self, parts: Sequence[MatrixPart]) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._pack_piece, [piece for part in parts for piece in _pieces(part)]))

    def _pack_piece(self, part: MatrixPart) -> None:
        row_map = np.ascontiguousarray(part.row_map, dtype=np.int32)
        target, rows = address(self._memory), row_map.ctypes.data_as(ctypes.c_void_p)
        if part.blocks is not None:
            blocks = np.ascontiguousarray(part.blocks)
            source = blocks.ctypes.data_as(ctypes.c_void_p)
            load_library().evo_pack_ggml(target, part.ggml_type, source, rows, len(row_map), self.k)
        else:
            assert part.values is not None
            values = part.values.float().contiguous()
            load_library().evo_pack_floats(target, address(values), rows, len(row_map), self.k)


def _pieces(part: MatrixPart, rows: int = 2048) -> list[MatrixPart]:
    def cut(begin: int) -> MatrixPart:
        piece = slice(begin, begin + rows)
        blocks = None if part.blocks is None else part.blocks[piece]
        values = None if part.values is None else part.values[piece]
        return MatrixPart(part.row_map[piece], part.ggml_type, blocks, values)

    return [cut(begin) for begin in range(0, len(part.row_map), rows)]


def _huge_zeros(num_bytes: int) -> torch.Tensor:
    """Zeros in huge pages where the system gives them: weights are read forward, and each 4 KiB page costs a walk."""
    # Private: by default Python's anonymous maps are shared, and Linux rarely gives those huge pages.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than float32 ones, as far as the compiled kernels know it."""
    return unsupported_reason() is None and bool(load_library().evo_has_fast_bf16())


@functools.cache
def max_exact_rows() -> int:
    """Up to so many rows of a step, a row's products with quantised weights do not depend on the other rows."""
    return int(load_library().evo_max_direct_rows())


def linear(team: Team, weight: PackedMatrix, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias: x [rows, k] bf16 → [rows, n] float32, in ``out`` if given."""
    out = torch.empty(len(x), weight.n) if out is None else out
    padded = _padded(weight, x)  # named: a copy must outlive the call
    load_library().evo_linear(team.handle, ctypes.byref(weight.struct), address(padded), len(x), address(out))
    return out


def linear_to_rows(team: Team, weight: PackedMatrix, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``linear`` of x [T, k] bf16 to ``rows`` [T] int32 of out [any, n] bf16."""
    padded = _padded(weight, x)
    arguments = address(padded), len(x), address(rows), address(out)
    load_library().evo_linear_to_rows(team.handle, ctypes.byref(weight.struct), *arguments)


def _padded(weight: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and as many rows as the kernel reads: whole tiles, where there are tiles."""
    if weight.format == BF16_FORMAT or len(x) > max_exact_rows():
        x = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16))
    return x.contiguous()


class KvCache:
    """Paged bf16 keys and values of all layers, in the layout of kernels/csrc/attention.h."""

    def __init__(self, num_layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> None:
        self.layer_elements = num_blocks * kv_heads * block_size * head_dim
        self._memory = _huge_zeros(2 * num_layers * self.layer_elements * 2).view(torch.bfloat16)
        keys, values = (
            self._memory[: num_layers * self.layer_elements],
            self._memory[num_layers * self.layer_elements :],
        )
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
    ) -> None:
        self._tensors = (positions, query_start_loc, seq_lens, block_tables, slot_mapping)
        if any(t.dtype != torch.int32 or not t.is_contiguous() for t in self._tensors):
            raise ValueError("batch tensors must be contiguous int32")
        self.struct = _Batch(
            len(positions), len(seq_lens), block_tables.shape[1], *(address(tensor) for tensor in self._tensors)
        )


def paged_attention(
    team: Team, batch: BatchView, cache: KvCache, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Write k, v [T, kv_heads, dim] into the cache, then attend with q [T, heads, dim]; float32 in and out."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # named: the copies must outlive the call
    out = torch.empty_like(q)
    load_library().evo_attention(
        team.handle,
        ctypes.byref(batch.struct),
        ctypes.byref(cache.struct),
        layer,
        *(q.shape[1], k.shape[1], q.shape[2]),
        *(address(tensor) for tensor in (q, k, v, out)),
    )
    return out


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. ``qkv``: one matrix for each run of equal storage formats among q, k and v, in order.

    ``gate_up`` has its rows in alternating groups of 16 (gate, up); norms are float32 [hidden]. With an
    ``embedding_norm`` (EAGLE-3) the input of ``qkv`` is [2 * hidden]: the token's normalised embedding, then the
    normalised residual stream.
    """

    qkv: Sequence[PackedMatrix]
    output: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    embedding_norm: torch.Tensor | None = None


class PassOutputs:
    """What a pass over T tokens leaves behind besides the residual stream, all bf16.

    Args:
        num_tokens: T.
        norm: weight of the final norm, float32 [hidden].
        captured: [C] int32, ascending: layers whose output is wanted.
    """

    def __init__(self, num_tokens: int, norm: torch.Tensor, captured: torch.Tensor) -> None:
        self.hidden = torch.empty(num_tokens, len(norm), dtype=torch.bfloat16)
        """[T, hidden] after the final norm"""
        self.features = torch.empty(num_tokens, len(captured) * len(norm), dtype=torch.bfloat16)
        """[T, C * hidden]: outputs of the captured layers side by side"""
        self._inputs = norm, captured  # alive as long as their addresses are used
        self.struct = _PassOutputs(
            address(norm), address(self.hidden), address(captured), len(captured), address(self.features)
        )


class Decoder:
    """The decoder stack: embedding lookup, layers, final norm. The residual stream is float32 [T, hidden].

    ``cos_sin`` is float32 [max_positions, head_dim]: cosines of the rotary angles, then sines.
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
        cos_sin: torch.Tensor,
        layers: Sequence[LayerWeights],
    ) -> None:
        self._hidden, self._team, self._cos_sin, self._layers = hidden, team, cos_sin.contiguous(), layers
        shape = _Shape(hidden, intermediate, heads, kv_heads, head_dim, norm_eps)
        library = load_library()
        self._handle = ctypes.c_void_p(
            library.evo_decoder_new(team.handle, ctypes.byref(shape), address(self._cos_sin))
        )
        for layer in layers:
            qkv = (_Matrix * 3)(*(matrix.struct for matrix in layer.qkv))
            struct = _Layer(
                *(qkv, len(layer.qkv), layer.output.struct, layer.gate_up.struct, layer.down.struct),
                *(address(layer.input_norm), address(layer.post_norm), address(layer.embedding_norm)),
            )
            library.evo_decoder_add_layer(self._handle, ctypes.byref(struct))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            load_library().evo_decoder_free(self._handle)

    def embed(self, table: PackedMatrix, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding: token_ids [T] int32 → [T, hidden] float32."""
        residual = torch.empty(len(token_ids), self._hidden)
        load_library().evo_decoder_embed(
            self._handle, ctypes.byref(table.struct), address(token_ids), len(token_ids), address(residual)
        )
        return residual

    def forward(
        self,
        batch: BatchView,
        cache: KvCache,
        residual: torch.Tensor,
        embeddings: torch.Tensor | None = None,
        lora: NativeLora | None = None,
        outputs: PassOutputs | None = None,
    ) -> None:
        """Run all layers on the residual stream, in place.

        For a draft layer: embeddings like it, and what its queries, keys and values gain.
        """
        load_library().evo_decoder_forward(
            self._handle,
            ctypes.byref(batch.struct),
            ctypes.byref(cache.struct),
            *(address(embeddings), None if lora is None else lora.pointer, address(residual)),
            ctypes.byref(_PassOutputs() if outputs is None else outputs.struct),
        )

    def final_norm(self, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """RMS norm: [T, hidden] float32 → bf16."""
        out = torch.empty(residual.shape, dtype=torch.bfloat16)
        load_library().evo_decoder_final_norm(
            self._handle, address(weight), address(residual), len(residual), address(out)
        )
        return out
