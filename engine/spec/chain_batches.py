"""The batches of a chain of drafts: one token of each sequence, a position further every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.batch import ForwardBatch
from engine.model_runner import padded_block_tables
from engine.step_plan import DraftSlot


def chain_batches(
    slots: Sequence[DraftSlot], block_size: int, device: torch.device
) -> Iterator[tuple[list[int], list[DraftSlot], ForwardBatch]]:
    """Batches of the newest draft tokens, until no sequence has room for another.

    Each is made from the one before, for a quarter of what it takes to build one. It is made when it is asked for: by
    then every sequence of the batch before must have got one more draft token.

    Args:
        slots: sequences that have one draft token each by the time of the first batch.
        block_size: tokens per block of the KV cache.
        device: where the model is.

    Yields:
        The rows that the sequences had in the batch before (at first: among ``slots``), the sequences, and their batch;
        logits are wanted of all.
    """
    ready = list(slots)
    rows = _rows_with_room(ready)
    if not rows:
        return
    tables = padded_block_tables(ready)
    positions = np.array([slot.request.num_tokens - 1 for slot in ready], dtype=np.int32)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    while rows:
        if len(rows) < len(ready):
            ready, tables, positions = [ready[row] for row in rows], tables[rows], positions[rows]
        positions = positions + 1  # a new array every time: the batch before may still be in use
        order = np.arange(len(rows) + 1, dtype=np.int32)
        blocks = tables[order[:-1], positions // block_size]
        batch = ForwardBatch(
            token_ids=tensor(np.array([slot.request.draft_token_ids[-1] for slot in ready], dtype=np.int32)),
            positions=tensor(positions),
            query_start_loc=tensor(order),
            seq_lens=tensor(positions + 1),
            block_tables=tensor(tables),
            slot_mapping=tensor(blocks * block_size + positions % block_size),
            logits_indices=tensor(order[:-1].astype(np.int64)),
        )
        yield rows, ready, batch
        rows = _rows_with_room(ready)


def _rows_with_room(slots: Sequence[DraftSlot]) -> list[int]:
    """Of those sequences that may have another draft token."""
    return [row for row, slot in enumerate(slots) if slot.num_tokens > len(slot.request.draft_token_ids)]
