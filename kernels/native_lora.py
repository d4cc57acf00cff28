"""ctypes bindings of the compiled low-rank adapters (kernels/csrc/lora.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from kernels.batched_lora import LoraMatrix, LoraPart, LoraRows
from kernels.native import Team, address, integers, load_library, pointers

_MAX_PARTS = 3
_MATRICES: tuple[LoraMatrix, ...] = ("qkv", "output", "down")


class _Part(ctypes.Structure):
    _fields_ = (*integers("start", "outputs"), *pointers("a", "b"))


class _Matrix(ctypes.Structure):
    _fields_ = (*integers("inputs", "num_parts"), ("parts", _Part * _MAX_PARTS))


class _Rows(ctypes.Structure):
    _fields_ = (*integers("rank"), *((name, _Matrix) for name in _MATRICES), *pointers("slots"))


class NativeLora:
    """A batch's adapters as the kernels read them; keeps the tensors alive.

    Args:
        rows: parts of equal rank, in bf16; up to three of a matrix, of equal inputs, a multiple of 32, and outputs that
            are multiples of 16.
    """

    def __init__(self, rows: LoraRows) -> None:
        self._rows = rows
        ranks = {part.a.shape[1] for part in rows.parts}
        weights = [weight for part in rows.parts for weight in (part.a, part.b)]
        if any(weight.dtype != torch.bfloat16 or not weight.is_contiguous() for weight in weights):
            raise ValueError("adapters must be contiguous bf16")
        rank, *others = ranks
        if others:
            raise ValueError(f"the kernels take adapters of one rank, not {sorted(ranks)}")
        matrices = (_matrix([part for part in rows.parts if part.matrix == name]) for name in _MATRICES)
        self._struct = _Rows(rank, *matrices, rows.slots.data_ptr())
        self.pointer = ctypes.pointer(self._struct)

    def add_to(self, out: torch.Tensor, x: torch.Tensor, team: Team) -> None:
        """Add to the product ``out`` [N, outputs] float32 of q, k and v of ``x`` [N, inputs] bf16, contiguous."""
        load_library().evo_lora(team.handle, self.pointer, address(x), len(x), out.shape[1], address(out))


def _matrix(parts: Sequence[LoraPart]) -> _Matrix:
    """The adapters of one matrix."""
    inputs = {part.a.shape[2] for part in parts}
    if len(inputs) > 1 or any(size % 32 for size in inputs) or len(parts) > _MAX_PARTS:
        raise ValueError(
            f"the kernels take up to {_MAX_PARTS} adapters of a matrix, their inputs the same multiple of 32, "
            f"not {len(parts)} of {sorted(inputs)}"
        )
    if any((part.end - part.start) % 16 for part in parts):
        raise ValueError("the kernels take adapters of a multiple of 16 outputs")
    structs = (_Part(part.start, part.end - part.start, part.a.data_ptr(), part.b.data_ptr()) for part in parts)
    return _Matrix(next(iter(inputs), 0), len(parts), (_Part * _MAX_PARTS)(*structs))
