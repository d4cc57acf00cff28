"""Low-rank adapters, each row of a batch its own (LoRA, arXiv 2106.09685; in one batch: Punica, arXiv 2310.18547).

All adapters of one matrix lie in two tensors, ``a`` [slots, rank, inputs] and ``b`` [slots, rank, outputs]. A row with
slot s gains (x a_s^T) b_s. A row with slot -1 gains nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from evospec.kernels.native import Team, address, integers, load_library, pointers

LoraMatrix = Literal["qkv", "output", "down"]
"""The matrices of a draft that adapters change; q, k and v are one."""
_MAX_PARTS = 3
_MATRICES: tuple[LoraMatrix, ...] = ("qkv", "output", "down")


class _Part(ctypes.Structure):
    _fields_ = (*integers("start", "outputs"), *pointers("a", "b"))


class _Matrix(ctypes.Structure):
    _fields_ = (*integers("inputs", "num_parts"), ("parts", _Part * _MAX_PARTS))


class _Rows(ctypes.Structure):
    _fields_ = (*integers("rank"), *((name, _Matrix) for name in _MATRICES), *pointers("slots"))


@dataclass(frozen=True)
class LoraPart:
    """The adapters of columns ``start`` .. ``end`` - 1 of a matrix's product.

    ``a`` [slots, rank, inputs] and ``b`` [slots, rank, end - start], contiguous; they may be overwritten between calls.
    """

    start: int
    end: int
    a: torch.Tensor
    b: torch.Tensor
    matrix: LoraMatrix = "qkv"


@dataclass(frozen=True)
class LoraRows:
    """What the rows of a batch gain: ``slots`` [N] int32, each row's adapter or -1, and the parts that are adapted."""

    slots: torch.Tensor
    parts: Sequence[LoraPart]

    @functools.cached_property
    def native(self) -> NativeLora:
        """As the compiled kernels read them."""
        return NativeLora(self)

    def add_to(self, out: torch.Tensor, x: torch.Tensor, matrix: LoraMatrix) -> None:
        """Add to the matrix's product ``out`` [N, outputs] of ``x`` [N, inputs], in place."""
        for part in self.parts:
            if part.matrix == matrix:
                batched_lora(out[:, part.start : part.end], x, part.a, part.b, self.slots)

    def of(self, wanted: torch.Tensor) -> LoraRows:
        """The same for some of the rows."""
        return LoraRows(self.slots[wanted], self.parts)


def batched_lora(out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor) -> None:
    """Add to each row of ``out`` what its adapter makes of the row of ``x``, in place.

    The compiled decoder does the same inside its layer (kernels/csrc/lora.cpp).

    Args:
        out: [N, outputs]; rows may lie apart.
        x: [N, inputs], of the dtype of ``out``.
        a: [slots, rank, inputs], of any floating-point dtype.
        b: [slots, rank, outputs], of the same.
        slots: [N] int32, -1: none.
    """
    if out.device.type == "cuda":
        from evospec.kernels.triton.batched_lora import batched_lora_triton

        batched_lora_triton(out, x, a, b, slots)
        return
    for slot in set(slots.tolist()) - {-1}:
        rows = (slots == slot).nonzero().squeeze(1)
        out[rows] += (x[rows] @ a[slot].to(x.dtype).T) @ b[slot].to(x.dtype)


class NativeLora:
    """A batch's adapters as the kernels read them; keeps the tensors alive.

    Args:
        rows: parts of equal rank, in bf16; up to three of a matrix, of equal inputs, a multiple of 32, and outputs that
            are multiples of 16.
    """

    def __init__(self, rows: LoraRows) -> None:
        self._kept = rows.slots, rows.parts
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
