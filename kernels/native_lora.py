"""ctypes bindings of the compiled low-rank adapters (kernels/csrc/lora.cpp)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from kernels.native import Team, address, load_library

if TYPE_CHECKING:
    from kernels.batched_lora import LoraRows

MAX_RANK = 256
_MAX_PARTS = 3


class _Part(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("num_parts", ctypes.c_int),
        ("parts", _Part * _MAX_PARTS),
        ("slots", ctypes.c_void_p),
    )


class NativeLora:
    """A batch's adapters as the kernels read them; keeps the tensors alive.

    Args:
        rows: up to three parts of equal rank, at most ``MAX_RANK``, and inputs, a multiple of 32, in bf16.
    """

    def __init__(self, rows: LoraRows) -> None:
        self._rows = rows
        shapes = {(part.a.shape[1], part.a.shape[2]) for part in rows.parts}
        weights = [weight for part in rows.parts for weight in (part.a, part.b)]
        if any(weight.dtype != torch.bfloat16 or not weight.is_contiguous() for weight in weights):
            raise ValueError("adapters must be contiguous bf16")
        (rank, inputs), *others = shapes
        if others or rank > MAX_RANK or inputs % 32:
            raise ValueError(f"the kernels take adapters of one shape, not {sorted(shapes)}")
        parts = (_Part(part.start, part.end - part.start, part.a.data_ptr(), part.b.data_ptr()) for part in rows.parts)
        self._struct = _Rows(rank, inputs, len(rows.parts), (_Part * _MAX_PARTS)(*parts), rows.slots.data_ptr())
        self.pointer = ctypes.pointer(self._struct)

    def add_to(self, out: torch.Tensor, x: torch.Tensor, team: Team) -> None:
        """Add to the product ``out`` [N, outputs] float32 of ``x`` [N, inputs] bf16, both contiguous, in place."""
        load_library().evo_lora(team.handle, self.pointer, address(x), len(x), out.shape[1], address(out))
