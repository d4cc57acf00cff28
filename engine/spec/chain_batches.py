"""The batches of a chain of drafts: one token of each sequence, a position further every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.batch import ForwardBatch
from engine.model_runner import padded_block_tables
from engine.scheduler import DraftSlot


class ChainBatches:
    """Makes each batch from the one before, for a quarter of what it takes to build one.

    Args:
        slots: the sequences whose first draft tokens are the rows of the first batch.
        block_size: tokens per block of the KV cache.
        device: where the model is.
    """

    def __init__(self, slots: Sequence[DraftSlot], block_size: int, device: torch.device) -> None:
        self._block_size, self._device = block_size, device
        self._tables = padded_block_tables(slots)
        self._positions = np.array([slot.request.num_tokens - 1 for slot in slots], dtype=np.int32)

    def next(self, token_ids: Sequence[int], rows: Sequence[int]) -> ForwardBatch:
        """One more token for some sequences; logits are wanted of all.

        Args:
            token_ids: one a sequence.
            rows: the rows that these sequences had in the batch before, ascending.
        """
        if len(rows) < len(self._positions):
            self._tables, self._positions = self._tables[rows], self._positions[rows]
        # New arrays every time: the batch before may still be in use.
        self._positions = positions = self._positions + 1
        order = np.arange(len(rows) + 1, dtype=np.int32)
        blocks = self._tables[order[:-1], positions // self._block_size]
        return ForwardBatch(
            token_ids=self._tensor(np.array(token_ids, dtype=np.int32)),
            positions=self._tensor(positions),
            query_start_loc=self._tensor(order),
            seq_lens=self._tensor(positions + 1),
            block_tables=self._tensor(self._tables),
            slot_mapping=self._tensor(blocks * self._block_size + positions % self._block_size),
            logits_indices=self._tensor(order[:-1].astype(np.int64)),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
