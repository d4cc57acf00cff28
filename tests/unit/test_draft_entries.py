"""What the ledger lets a draft compute; that it is right after any history shows in integration/test_eagle_history."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

import pytest

from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request
from evospec.engine.speculation.drafters import kv as entries
from evospec.engine.speculation.drafters.kv import DraftKvTracker
from evospec.engine.step import DraftSlot, ScheduledSequence

BLOCK = 16


def make_request(num_tokens: int) -> Request:
    return Request(f"request {num_tokens}", b"", "", SamplingParams(max_tokens=99, seed=0), list(range(num_tokens)))


def compute(
    ledger: DraftKvTracker, request: Request, blocks: Iterable[int], start: int, end: int, num_kept: int = 0
) -> None:
    """The target computes tokens start .. end - 1; those after the known ones are drafts, ``num_kept`` - 1 accepted."""
    num_drafts = max(end - request.num_tokens, 0)
    step = ScheduledSequence(request, start, [7] * (end - start), num_drafts, 0, 1 + num_drafts, array("i", blocks))
    ledger.mark_computed(step, 0)
    request.all_token_ids += [7] * num_kept
    request.num_computed_tokens = end - num_drafts + max(num_kept - 1, 0)


def slot_of(request: Request, num_tokens: int, blocks: Iterable[int]) -> DraftSlot:
    return DraftSlot(request, num_tokens, array("i", blocks))


def caught_up(ledger: DraftKvTracker, *slots: DraftSlot) -> list[tuple[int, int]]:
    """Start and number of tokens of each chunk."""
    return [(chunk.start, len(chunk.token_ids)) for chunk in ledger.catch_up(slots)[0]]


def test_only_new_tokens_are_computed() -> None:
    ledger, request, blocks = DraftKvTracker(8, BLOCK), make_request(40), [3, 1, 4]
    compute(ledger, request, blocks, 0, 30)
    compute(ledger, request, blocks, 30, 40, num_kept=1)
    slot = slot_of(request, 4, blocks)
    assert caught_up(ledger, slot) == [(0, 41)]
    compute(ledger, request, blocks, 40, 45, num_kept=3)
    assert caught_up(ledger, slot) == [(41, 3)]


def test_a_shared_prefix_is_computed_once() -> None:
    ledger = DraftKvTracker(8, BLOCK)
    first, second, third = make_request(40), make_request(41), make_request(42)
    compute(ledger, first, [0, 1, 2], 0, 40, num_kept=1)
    compute(ledger, second, [0, 1, 3], 32, 41, num_kept=1)
    slots = [slot_of(first, 4, [0, 1, 2]), slot_of(second, 4, [0, 1, 3])]
    assert caught_up(ledger, *slots) == [(0, 41), (32, 10)]
    ledger.forget(first)
    compute(ledger, third, [0, 1, 4], 32, 42, num_kept=1)
    assert caught_up(ledger, slot_of(third, 4, [0, 1, 4])) == [(32, 11)]


def test_blocks_used_again_are_computed_again() -> None:
    """Also one that the target has not written to yet: it holds the newest token alone."""
    ledger, old, new = DraftKvTracker(8, BLOCK), make_request(47), make_request(31)
    compute(ledger, old, [0, 1, 2], 0, 47, num_kept=1)
    caught_up(ledger, slot_of(old, 1, [0, 1, 2]))
    ledger.forget(old)
    compute(ledger, new, [1, 0], 0, 32, num_kept=2)
    assert new.num_computed_tokens == 32
    assert caught_up(ledger, slot_of(new, 4, [1, 0, 2])) == [(0, 33)]
    assert caught_up(ledger, slot_of(new, 4, [1, 0, 2])) == [(32, 1)]


def test_a_sequence_that_got_no_token_does_not_keep_others_from_their_drafts() -> None:
    """Its grammar's mask came late: its last token is known to the draft already, and is read once more."""
    ledger, late, other = DraftKvTracker(8, BLOCK), make_request(20), make_request(21)
    slots = slot_of(late, 3, [0, 1]), slot_of(other, 3, [2, 3])
    for request, slot in zip((late, other), slots, strict=True):
        compute(ledger, request, slot.block_ids, 0, request.num_tokens, num_kept=1)
    assert caught_up(ledger, *slots) == [(0, 21), (0, 22)]
    compute(ledger, late, slots[0].block_ids, 20, 24)
    compute(ledger, other, slots[1].block_ids, 21, 25, num_kept=1)
    assert caught_up(ledger, *slots) == [(20, 1), (22, 1)]


def test_of_many_sequences_none_waits_for_ever() -> None:
    """Each gains some tokens a step; those left out once have more to catch up with than the others."""
    ledger = DraftKvTracker(4096, BLOCK)
    requests = [make_request(20 + number % 3) for number in range(256)]
    for number, request in enumerate(requests):
        request.request_id = str(number)
    slots = [slot_of(request, 4, range(16 * n, 16 * n + 16)) for n, request in enumerate(requests)]
    for slot in slots:
        compute(ledger, slot.request, slot.block_ids, 0, slot.request.num_tokens, num_kept=1)
    served: Counter[str] = Counter()
    for _ in range(30):
        served.update(slot.request.request_id for slot in ledger.catch_up(slots)[1])
        for slot in slots:
            start = slot.request.num_tokens - 1
            compute(ledger, slot.request, slot.block_ids, start, start + 5, num_kept=4)
    assert len(served) == len(slots)
    assert min(served.values()) > 20


def test_short_pieces_come_first_and_long_ones_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "MAX_CATCH_UP_TOKENS", 50)
    ledger, long, short = DraftKvTracker(16, BLOCK), make_request(99), make_request(20)
    slots = [slot_of(long, 4, range(7)), slot_of(short, 4, [8, 9])]
    compute(ledger, long, range(7), 0, 99, num_kept=1)
    compute(ledger, short, [8, 9], 0, 20, num_kept=1)
    chunks, ready = ledger.catch_up(slots)
    assert [(chunk.start, len(chunk.token_ids), chunk.num_logits) for chunk in chunks] == [(0, 21, 1), (0, 29, 0)]
    assert ready == slots[1:]
    assert ledger.catch_up(slots[:1])[1] == []
    chunks, ready = ledger.catch_up(slots[:1])
    assert [(chunk.start, len(chunk.token_ids)) for chunk in chunks] == [(79, 21)]
    assert ready == slots[:1]
