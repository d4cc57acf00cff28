"""ctypes bindings of the compiled CPU kernels (kernels/csrc): threads, packed weights and their products.

All buffers are torch tensors owned by the Python objects here; the library only sees their addresses.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from evospec.kernels.huge_pages import huge_zeros
from evospec.kernels.targets import TARGETS, best_target

BF16_FORMAT = 0
"""Number of the packed format that holds floating-point weights."""
DIGITS_OF_BITS = {8: 1, 15: 2}
"""Digits that hold so many bits of an activation."""
_GROUP_PAIR = 32
"""Weight rows are stored in pairs of 16-column groups."""
_VALUES_PACKED_AT_ONCE = 2**18
"""By one thread; the file's numbers and what is made of them are in memory as well."""


def pointers(*names: str) -> tuple[tuple[str, type[ctypes.c_void_p]], ...]:
    """Fields of a structure: addresses."""
    return tuple((name, ctypes.c_void_p) for name in names)


def integers(*names: str) -> tuple[tuple[str, type[ctypes.c_int]], ...]:
    """Fields of a structure: int32."""
    return tuple((name, ctypes.c_int) for name in names)


class MatrixStruct(ctypes.Structure):
    _fields_ = (*integers("format", "n", "k", "digits"), *pointers("data", "bias"))


def unsupported_reason() -> str | None:
    """Why the compiled kernels cannot be used in this process; None where they can."""
    target = best_target()
    if target is None:
        return f"the CPU lacks {', '.join(TARGETS[-1].missing)}"
    if not target.library.exists():
        return f"{target.library.name} is not built (python -m evospec.kernels.build)"
    if not target.is_of_these_sources:  # the structures of others may be others
        return f"{target.library.name} is of other sources than these (python -m evospec.kernels.build)"
    try:
        ctypes.CDLL(str(target.library))
    except OSError as error:
        return f"{target.library.name} cannot be loaded: {error}"
    return None


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library; check ``unsupported_reason`` first."""
    target = best_target()
    assert target is not None, unsupported_reason()
    library = ctypes.CDLL(str(target.library))
    library.evo_find_tiles()
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


def matrix_bytes(n: int, k: int, packed_format: int) -> int:
    """Memory of a packed matrix [n, k]."""
    num_blocks = -(-n // _GROUP_PAIR) * _GROUP_PAIR // 16 * (k // 32)
    return int(num_blocks * load_library().evo_block_bytes(packed_format))


@dataclass(frozen=True)
class MatrixPart:
    """Rows of a weight matrix, and ``row_map`` [rows]: where each goes in the packed one.

    Exactly one of ``blocks`` (GGUF blocks, uint8 [rows, bytes], of ggml type ``ggml_type``) and ``values``
    (float32 [rows, k], stored as bf16) is given, or what reads some of them: no matrix is then in memory twice.
    """

    row_map: npt.NDArray[np.integer]
    ggml_type: int | None = None
    blocks: npt.NDArray[np.uint8] | Callable[[slice], npt.NDArray[np.uint8]] | None = None
    values: torch.Tensor | Callable[[slice], torch.Tensor] | None = None

    @property
    def format(self) -> int:
        return BF16_FORMAT if self.ggml_type is None else packed_format(self.ggml_type)


class PackedMatrix:
    """A weight [n, k] in the layout of kernels/csrc/matrix.h, in the precision of its source.

    Args:
        n, k: shape; k a multiple of 32.
        parts: together all n rows, all of one packed format.
        bias: float32 [n], or None.
        digits: of 8 bits each, that activations have where they are multiplied with quantised weights: 1 or 2.
            With AVX2 always 2 where weights have 8 bits.
    """

    def __init__(
        self, n: int, k: int, parts: Sequence[MatrixPart], bias: torch.Tensor | None = None, digits: int = 2
    ) -> None:
        formats = {part.format for part in parts}
        if len(formats) != 1 or k % 32:
            raise ValueError(f"cannot pack: formats {formats}, k = {k}")
        self.n, self.k, self.format = n, k, formats.pop()
        self.num_bytes = matrix_bytes(n, k, self.format)
        self._memory = huge_zeros(self.num_bytes)
        self._bias = None if bias is None else torch.nn.functional.pad(bias.float(), (0, -n % _GROUP_PAIR))
        self._pack(parts)
        self.struct = MatrixStruct(self.format, n, k, digits, self._memory.data_ptr(), address(self._bias))

    def repack(self, parts: Sequence[MatrixPart], bias: torch.Tensor | None = None) -> None:
        """Put another weight of the same shape and format in place, and another bias; arguments as at first."""
        if {part.format for part in parts} != {self.format}:
            raise ValueError(f"not of format {self.format}")
        if self._bias is not None and bias is not None:
            self._bias[: self.n].copy_(bias)
        self._memory.zero_()  # codes of less than eight bits are added to what is there
        self._pack(parts)

    def _pack(self, parts: Sequence[MatrixPart]) -> None:
        height = max(_VALUES_PACKED_AT_ONCE // self.k // _GROUP_PAIR, 1) * _GROUP_PAIR
        pieces = [(part, begin, height) for part in parts for begin in range(0, len(part.row_map), height)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(self._pack_piece, *zip(*pieces, strict=True)))

    def _pack_piece(self, part: MatrixPart, begin: int, height: int) -> None:
        piece = slice(begin, min(begin + height, len(part.row_map)))
        rows = np.ascontiguousarray(part.row_map[piece], dtype=np.int32)
        places = rows.ctypes.data_as(ctypes.c_void_p), len(rows), self.k
        if part.blocks is not None:
            blocks = np.ascontiguousarray(part.blocks(piece) if callable(part.blocks) else part.blocks[piece])
            source = blocks.ctypes.data_as(ctypes.c_void_p)
            load_library().evo_pack_ggml(address(self._memory), part.ggml_type, source, *places)
        else:
            assert part.values is not None
            values = (part.values(piece) if callable(part.values) else part.values[piece]).float().contiguous()
            load_library().evo_pack_floats(address(self._memory), address(values), *places)


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than float32 ones, as far as the compiled kernels know it."""
    return unsupported_reason() is None and bool(load_library().evo_has_fast_bf16())


def has_amx() -> bool:
    """Whether the compiled kernels compute prompts with AMX's tiles, which round otherwise than what is decoded."""
    return unsupported_reason() is None and bool(load_library().evo_has_amx())


def linear(team: Team, weight: PackedMatrix, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias: x [rows, k] bf16 → [rows, n] float32, in ``out`` if given."""
    count = x.shape[0]
    out = torch.empty(count, weight.n) if out is None else out
    if count == 0:  # AMX would fault: it has no tiles of no rows
        return out
    padded = padded_rows(weight, x)  # named: a copy must outlive the call
    load_library().evo_linear(team.handle, ctypes.byref(weight.struct), address(padded), count, address(out))
    return out


def linear_to_rows(team: Team, weight: PackedMatrix, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``linear`` of x [T, k] bf16 to ``rows`` [T] int32 of out [any, n] bf16."""
    padded = padded_rows(weight, x)
    arguments = address(padded), x.shape[0], address(rows), address(out)
    load_library().evo_linear_to_rows(team.handle, ctypes.byref(weight.struct), *arguments)


def norm_features(team: Team, features: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each part of features [T, parts * size] bf16, weight [parts, size] float32 → bf16 of the same shape.

    ``size`` is a multiple of 16.
    """
    features, out = features.contiguous(), torch.empty_like(features)
    arguments = address(features), address(weight), features.shape[0], *weight.shape, ctypes.c_float(eps), address(out)
    load_library().evo_norm_features(team.handle, *arguments)
    return out


def padded_rows(weight: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and as many rows as the kernel reads: whole tiles, where there are tiles."""
    if weight.format == BF16_FORMAT:
        x = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16))
    return x.contiguous()
