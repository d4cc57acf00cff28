"""What the compiled kernels that choose tokens have in common (kernels/csrc/rows.h).

Logits are float32 [N, V] on the CPU, their rows contiguous; the other tensors are contiguous.
"""

from __future__ import annotations

import ctypes
import functools
from array import array

import torch

from evospec.kernels.native import Team, address, integers, pointers, unsupported_reason


class _LogitRows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_size_t),
        *integers("rows", "columns"),
        *pointers("allowed", "places"),
    )


@functools.cache
def is_built() -> bool:
    """Whether there are compiled kernels here."""
    return unsupported_reason() is None


def can_take(logits: torch.Tensor) -> bool:
    """Whether these kernels serve such logits here."""
    return (
        not logits.is_cuda
        and logits.dtype == torch.float32
        and logits.stride(-1) == 1
        and logits.numel() > 0
        and is_built()
    )


def logit_rows(
    logits: torch.Tensor, allowed: torch.Tensor | None = None, places: array[int] | None = None
) -> ctypes._CArgObject:
    """The rows of logits, or those at some places, as an argument of the library.

    Args:
        logits: [N, V], which ``can_take`` takes.
        allowed: [N, ceil(V / 32)] int32, bits of the columns that may be chosen (None: all).
        places: numbers of rows; the array must outlive the call.
    """
    count, columns = logits.shape
    of_places = None
    if places is not None:
        of_places, count = places.buffer_info()
    return ctypes.byref(_LogitRows(logits.data_ptr(), logits.stride(0), count, columns, address(allowed), of_places))


def team_handle(team: Team | None) -> ctypes.c_void_p:
    """Threads as an argument of the library; None runs on the calling thread alone."""
    return ctypes.c_void_p(None) if team is None else team.handle
