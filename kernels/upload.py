"""Arrays of the host as tensors of a device, in one copy that nobody waits for.

From ordinary memory each array would be a copy of its own, and the host would wait for it. So all of them travel side
by side in pinned memory, which torch keeps until the copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from numpy.typing import NDArray

_ALIGNMENT = 16
"""Bytes, as kernels like it."""


def upload(device: torch.device, *arrays: NDArray[Any]) -> list[torch.Tensor]:
    """The arrays on a device; on a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _parts(_packed(arrays, device).to(device, non_blocking=True), arrays)


class FixedMemory:
    """Memory that CUDA graphs read: arrays on a device, which are written anew, in the same shapes, for each step."""

    def __init__(self, device: torch.device, *arrays: NDArray[Any]) -> None:
        self._block = torch.empty(_starts(arrays)[-1], dtype=torch.uint8, device=device)
        self.tensors = _parts(self._block, arrays)
        """One for each array."""
        self.write(*arrays)

    def write(self, *arrays: NDArray[Any]) -> None:
        """Put arrays of the same shapes in place of what is there."""
        self._block.copy_(_packed(arrays, self._block.device), non_blocking=True)


def _packed(arrays: Sequence[NDArray[Any]], device: torch.device) -> torch.Tensor:
    """Arrays side by side: uint8 [n] on the CPU, pinned where they go on to a GPU."""
    side_by_side = bytearray().join([array.tobytes().ljust(_room(array)) for array in arrays])
    block = torch.empty(len(side_by_side), dtype=torch.uint8, pin_memory=device.type == "cuda")
    block.numpy().data[:] = side_by_side
    return block


def _parts(block: torch.Tensor, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    """The arrays of a block that was ``_packed``, wherever it is now."""
    return [
        block[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, array in zip(_starts(arrays), arrays, strict=False)
    ]


def _starts(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    return list(accumulate(map(_room, arrays), initial=0))


def _room(array: NDArray[Any]) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
