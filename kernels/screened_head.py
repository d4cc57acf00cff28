"""Logits of which only each row's largest has to be right, for less reading (kernels/csrc/screened_head.h)."""

from __future__ import annotations

import ctypes

import torch

from evospec.kernels.huge_pages import huge_zeros
from evospec.kernels.native import (
    MatrixStruct,
    PackedMatrix,
    Team,
    address,
    load_library,
    matrix_bytes,
    padded_rows,
    pointers,
)

MOST_ROWS = 8
"""More rows are multiplied with the head itself in as little time."""
_FORMAT, _DIGITS = 4, 1
"""4 bits a weight, times activations of 8 bits, which round a tenth of what the weights do."""
_LEAST_BYTES = 2**24
"""A smaller head stays in the caches."""
_LEAST_GAIN = 1.5
"""How many times as large as its copy a head has to be."""


class _Struct(ctypes.Structure):
    _fields_ = (("head", MatrixStruct), ("estimate", MatrixStruct), *pointers("errors"))


def is_worth_it(head: PackedMatrix) -> bool:
    """Whether a copy of 4 bits a weight saves so much reading that it is worth its memory."""
    return head.num_bytes >= max(_LEAST_BYTES, _LEAST_GAIN * matrix_bytes(head.n, head.k, _FORMAT))


class ScreenedHead:
    """A head [vocab, hidden] with a copy of 4 bits a weight, which tells what may be a row's largest logit."""

    def __init__(self, team: Team, head: PackedMatrix) -> None:
        self._team, self._head = team, head
        self._memory = huge_zeros(matrix_bytes(head.n, head.k, _FORMAT))
        self._errors = torch.zeros(-(-head.n // 32) * 32)
        estimate = MatrixStruct(_FORMAT, head.n, head.k, _DIGITS, self._memory.data_ptr(), head.struct.bias)
        self._struct = _Struct(head.struct, estimate, self._errors.data_ptr())
        load_library().evo_round_head(
            team.handle, ctypes.byref(self._struct), address(self._memory), address(self._errors)
        )

    @property
    def num_bytes(self) -> int:
        """Of what is there besides the head."""
        return len(self._memory) + 4 * len(self._errors)

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write logits of x [rows, hidden] bf16 to ``out`` [rows, vocab] float32, and return it.

        Of each row those that may be its largest are as ``linear`` computes them. The others may be estimates, which
        are smaller than the largest.
        """
        padded = padded_rows(self._head, x)  # named: a copy must outlive the call
        load_library().evo_screened_logits(
            self._team.handle, ctypes.byref(self._struct), address(padded), x.shape[0], address(out)
        )
        return out
