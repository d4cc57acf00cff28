"""What a draft keeps of the target's features: a row for each slot of the KV cache."""

from __future__ import annotations

import numpy as np
import torch

from engine.batch import Features
from engine.speculation.drafters.eagle_network import EagleNetwork

_MOST_WAITING = 64
"""Tokens whose features may wait. Fusing 8 of them takes two fifths of the time of 64, most of it for the weights."""


class FeatureStore:
    """Written when a row is read or many are waiting: while nothing is drafted, fusing steps one by one is dear.

    On CUDA nothing waits: the features lie in buffers that the next step overwrites.

    Args:
        num_slots: of the KV cache. One more row, ``num_slots``, stands for what comes before a sequence: always 0.
        width: values of a row.
        network: fuses features into g; None: they are stored as they are.
        dtype: of the rows.
        device: of the target.
    """

    def __init__(
        self, num_slots: int, width: int, network: EagleNetwork | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.before_first = num_slots
        self._network = network
        self._rows = torch.zeros(num_slots + 1, width, dtype=dtype, device=device)
        self._waiting: list[Features] = []
        self._most_waiting = 0 if device.type == "cuda" else _MOST_WAITING

    def add(self, features: Features) -> None:
        """Take the features of a step's tokens; those of a slot replace what it had."""
        self._waiting.append(features)
        if sum(len(waiting.slots) for waiting in self._waiting) >= self._most_waiting:
            self._write()

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """[T] int64 → [T, width]."""
        self._write()
        return self._rows.index_select(0, slots)

    def _write(self) -> None:
        if not self._waiting:
            return
        features = self._waiting[0] if len(self._waiting) == 1 else _latest(self._waiting)
        self._waiting.clear()
        if self._network is None:
            self._rows.index_copy_(0, features.slots.long(), features.values.to(self._rows.dtype))
        else:
            self._network.fuse_into(self._rows, features)


def _latest(steps: list[Features]) -> Features:
    """Of each slot what came last: two threads may write the rows of one product in any order."""
    values, slots = torch.cat([step.values for step in steps]), torch.cat([step.slots for step in steps])
    _, from_end = np.unique(slots.numpy()[::-1], return_index=True)
    if len(from_end) == len(slots):
        return Features(values, slots)
    kept = torch.from_numpy(len(slots) - 1 - from_end)
    return Features(values[kept], slots[kept])
