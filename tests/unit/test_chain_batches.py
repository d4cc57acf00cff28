"""The batches of a chain are those that would be built from scratch."""

from __future__ import annotations

from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.messages import SamplingParams
from evospec.engine.model_runner import build_batch
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.kv import Chunk, chain_batches
from evospec.engine.step import DraftSlot, Proposal

CPU = torch.device("cpu")
FIELDS = ("token_ids", "positions", "query_start_loc", "seq_lens", "block_tables", "slot_mapping", "logits_indices")


@st.composite
def some_slots(draw: st.DrawFn) -> tuple[list[DraftSlot], int]:
    """Sequences of different lengths, each with room for different numbers of drafts, and the size of a block."""
    block_size = draw(st.sampled_from([1, 4, 16]))
    slots = []
    for number in range(draw(st.integers(1, 5))):
        num_tokens, num_drafts = draw(st.integers(1, 40)), draw(st.integers(1, 5))
        sampling = SamplingParams(max_tokens=99, seed=0)
        request = Request(str(number), b"", "", sampling, list(range(num_tokens)))
        num_blocks = -(-(num_tokens + num_drafts) // block_size)
        blocks = draw(st.lists(st.integers(0, 500), min_size=num_blocks, max_size=num_blocks + 2))
        slots.append(DraftSlot(request, num_drafts, array("i", blocks)))
    return slots, block_size


def last_draft(slot: DraftSlot, drafts: list[int]) -> Chunk:
    """The newest draft token, from which the next one is drafted."""
    request = slot.request
    return Chunk(request.num_tokens + len(drafts) - 1, drafts[-1:], 1, slot.block_ids, request)


@given(some_slots())
def test_each_batch_is_as_one_built_from_scratch(case: tuple[list[DraftSlot], int]) -> None:
    ready, block_size = case
    proposals = {slot.request: Proposal([]) for slot in ready}
    batches = chain_batches(ready, proposals, block_size, CPU)
    for step in range(1, max(slot.num_tokens for slot in ready)):
        for slot in ready:
            proposals[slot.request].token_ids.append(1000 * step + int(slot.request.request_id))
        longer = [row for row, slot in enumerate(ready) if slot.num_tokens > step]
        ready = [ready[row] for row in longer]
        rows, slots, batch = next(batches)
        assert (rows, slots) == (longer, ready)
        expected = build_batch([last_draft(slot, proposals[slot.request].token_ids) for slot in ready], block_size, CPU)
        for field in FIELDS:
            ours, theirs = getattr(batch, field), getattr(expected, field)
            if field == "block_tables":  # further columns are of sequences that have left
                ours = ours[:, : theirs.shape[1]]
            assert ours.dtype == theirs.dtype, field
            assert torch.equal(ours, theirs), field
    for slot in ready:
        proposals[slot.request].token_ids.append(0)
    assert next(batches, None) is None
