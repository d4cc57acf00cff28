"""What a draft keeps in the slots of the target's KV cache: entries of its own, and the target's features."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.batch import Features, ForwardBatch, padded_block_tables
from evospec.engine.model_runner import slots_of
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.eagle_network import EagleNetwork
from evospec.engine.step import DraftSlot, Proposal, ScheduledSequence

MAX_CATCH_UP_TOKENS = 512
"""Most unseen tokens that one call of ``catch_up`` lets a draft compute, of few sequences; the rest waits a step."""
TOKENS_EACH = 8
"""The same of many sequences, for each: more than they gain in a step, or some would never catch up."""
_MOST_WAITING = 64
"""Tokens whose features may wait. Fusing 8 of them takes two fifths of the time of 64, most of it for the weights."""


class Chunk(msgspec.Struct, frozen=True):
    """Tokens of one sequence that a draft computes; a ``BatchSequence``."""

    start: int
    token_ids: list[int]
    num_logits: int
    block_ids: array[int]
    request: Request


class DraftKvTracker:
    """Keeps account of a draft's entries in the target's blocks.

    Nothing is computed before a sequence is drafted for, not even its prompt: while speculation does not pay, the draft
    costs next to nothing. A sequence with more than ``MAX_CATCH_UP_TOKENS`` unseen tokens may get its first draft some
    steps later. Full blocks remember whether their entries were computed, so that no shared prefix is computed again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._num_entries: dict[Request, int] = {}
        """Of each sequence, how many of its first tokens have one; none where nothing is said."""
        self._complete = bytearray(num_blocks)
        """For each block: whether all its entries were computed since the target last wrote to it."""

    def catch_up(self, slots: Sequence[DraftSlot]) -> tuple[list[Chunk], list[DraftSlot]]:
        """The unseen tokens to compute now; they count as computed from here on.

        One of the chunks may need entries that another computes: a layer must write all before it attends.

        Args:
            slots: the sequences to draft for; of each, ``mark_computed`` was told.

        Returns:
            The chunks, and the slots that they bring up to date, in the same order: those whose chunk wants logits.
        """
        budget = max(MAX_CATCH_UP_TOKENS, TOKENS_EACH * len(slots))
        chunks: list[Chunk] = []
        ready: list[DraftSlot] = []
        for slot in sorted(slots, key=lambda slot: slot.request.num_tokens - self._num_of(slot.request)):
            token_ids = slot.request.all_token_ids
            start = self._skip_complete(slot)
            end = min(len(token_ids), start + budget)
            if end == start:
                break
            budget -= end - start
            is_ready = end == len(token_ids)
            chunks.append(Chunk(start, token_ids[start:end], int(is_ready), slot.block_ids, slot.request))
            self._set_computed(slot.request, slot.block_ids, start, end)
            if is_ready:
                ready.append(slot)
        return chunks, ready

    def mark_computed(self, sequence: ScheduledSequence, num_drafted: int) -> None:
        """A step's tokens were computed by the target.

        Args:
            sequence: as scheduled.
            num_drafted: how many of its accepted drafts have an entry as good as one computed by ``catch_up``.
        """
        request, start, end = sequence.request, sequence.start, sequence.start + len(sequence.token_ids)
        for block_id in sequence.block_ids[start // self._block_size : -(-end // self._block_size)]:
            self._complete[block_id] = False
        num_computed = self._num_of(request) + num_drafted
        self._set_computed(request, sequence.block_ids, start, num_computed)

    def num_behind(self, request: Request) -> int:
        """Tokens without an entry, but for the few that are new with every draft; shared blocks are not looked at."""
        return max(request.num_tokens - self._num_of(request) - TOKENS_EACH, 0)

    def outdate(self) -> None:
        """The draft has other weights: no entry that is there already is taken over by a new sequence."""
        self._complete = bytearray(len(self._complete))

    def forget(self, request: Request) -> None:
        """A request has lost its blocks; of these the knowledge stays."""
        self._num_entries.pop(request, None)

    def _num_of(self, request: Request) -> int:
        """Its first tokens with an entry."""
        return self._num_entries.get(request, 0)

    def _skip_complete(self, slot: DraftSlot) -> int:
        """Tokens with an entry, those included that another sequence has computed in a shared block.

        The last known token is not among them: the draft goes on from its state. And only blocks that the target has
        filled count: the others' flags may be left over from an earlier use.
        """
        num_computed = self._num_of(slot.request)
        block, num_full = num_computed // self._block_size, slot.request.num_computed_tokens // self._block_size
        while block < num_full and self._complete[slot.block_ids[block]]:
            block += 1
        return min(max(num_computed, block * self._block_size), slot.request.num_tokens - 1)

    def _set_computed(self, request: Request, block_ids: Sequence[int], start: int, num_computed: int) -> None:
        """All tokens before ``num_computed`` have entries now; before ``start`` nothing has changed."""
        self._num_entries[request] = num_computed
        for block_id in block_ids[start // self._block_size : num_computed // self._block_size]:
            self._complete[block_id] = True


def chain_batches(
    slots: Sequence[DraftSlot],
    proposals: Mapping[Request, Proposal],
    block_size: int,
    device: torch.device,
    shift: int = 0,
) -> Iterator[tuple[list[int], list[DraftSlot], ForwardBatch]]:
    """Batches of the newest draft tokens, until no sequence has room for another.

    Each is made from the one before, for a quarter of what it takes to build one. It is made when it is asked for: by
    then every sequence of the batch before must have got one more draft token.

    Args:
        slots: sequences that have one draft token each by the time of the first batch.
        proposals: where these are.
        block_size: tokens per block of the KV cache.
        device: where the model is.
        shift: a token's entry lies so many places before the token's own.

    Yields:
        The rows that the sequences had in the batch before (at first: among ``slots``), the sequences, and their batch;
        logits are wanted of all.
    """
    ready = list(slots)
    rows = _rows_with_room(ready, proposals)
    if not rows:
        return
    tables = padded_block_tables([slot.block_ids for slot in ready])
    positions = np.array([slot.request.num_tokens - 1 - shift for slot in ready], dtype=np.int32)
    while rows:
        if len(rows) < len(ready):
            ready, tables, positions = [ready[row] for row in rows], tables[rows], positions[rows]
        positions = positions + 1  # a new array every time: the batch before may still be in use
        token_ids = np.array([proposals[slot.request].token_ids[-1] for slot in ready], dtype=np.int32)
        yield rows, ready, one_token_each(token_ids, positions, tables, block_size).on(device)
        rows = _rows_with_room(ready, proposals)


def one_token_each(
    token_ids: NDArray[np.int32], positions: NDArray[np.int32], tables: NDArray[np.int32], block_size: int
) -> ForwardBatch:
    """The batch of one token a sequence [N] at these positions [N], with block tables [N, max_blocks]; on the CPU."""
    order = np.arange(len(token_ids) + 1, dtype=np.int32)
    blocks = tables[order[:-1], positions // block_size]
    return ForwardBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        query_start_loc=torch.from_numpy(order),
        seq_lens=torch.from_numpy(positions + 1),
        block_tables=torch.from_numpy(tables),
        slot_mapping=torch.from_numpy(blocks * block_size + positions % block_size),
        logits_indices=torch.from_numpy(order[:-1].astype(np.int64)),
    )


def _rows_with_room(slots: Sequence[DraftSlot], proposals: Mapping[Request, Proposal]) -> list[int]:
    """Of those sequences that may have another draft token."""
    return [row for row, slot in enumerate(slots) if slot.num_tokens > len(proposals[slot.request].token_ids)]


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
        self._num_waiting = 0
        self._most_waiting = 0 if device.type == "cuda" else _MOST_WAITING

    def add(self, features: Features) -> None:
        """Take the features of a step's tokens; those of a slot replace what it had."""
        self._waiting.append(features)
        self._num_waiting += features.slots.shape[0]
        if self._num_waiting >= self._most_waiting:
            self._write()

    @property
    def all_rows(self) -> torch.Tensor:
        """[num_slots + 1, width], valid until the next ``add``."""
        self._write()
        return self._rows

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """[T] int64 → [T, width]."""
        return self.all_rows.index_select(0, slots)

    def slots_before(self, chunks: Sequence[Chunk], shift: int, block_size: int) -> list[int]:
        """The slot of the position before each token; ``chunks`` by the places of their entries.

        ``shift``: an entry lies so many places before its token.
        """
        slots: list[int] = []
        for chunk in chunks:
            start = chunk.start + shift - 1
            end = start + len(chunk.token_ids)
            if start < 0:
                slots.append(self.before_first)
                start = 0
            slots += slots_of(chunk.block_ids, start, end, block_size)
        return slots

    def _write(self) -> None:
        if not self._waiting:
            return
        features = self._waiting[0] if len(self._waiting) == 1 else _latest(self._waiting)
        self._waiting.clear()
        self._num_waiting = 0
        if self._network is None:
            self._rows.index_copy_(0, features.slots.long(), features.values.to(self._rows.dtype))
        else:
            self._network.fuse_into(self._rows, features)


def _latest(steps: list[Features]) -> Features:
    """Of each slot what came last: two threads may write the rows of one product in any order."""
    values, slots = torch.cat([step.values for step in steps]), torch.cat([step.slots for step in steps])
    last = {slot: row for row, slot in enumerate(slots.tolist())}
    if len(last) == slots.shape[0]:
        return Features(values, slots)
    kept = torch.tensor(list(last.values()))
    return Features(values[kept], slots[kept])
