"""Tails under any sequence of insertions and uses: slots stable, none twice, residency kept, all bounded."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.reference.replacement import FIXED_TARGET_EVENTS, ArcReplacement, LruReplacement, Replacement

TOKENS = st.lists(st.integers(0, 14), max_size=8)
POLICIES = [ArcReplacement, LruReplacement]


class TailMachine(RuleBasedStateMachine):
    """A policy against a model of its slots: which token is where, and since which verified step."""

    policy: type[ArcReplacement | LruReplacement]

    @initialize(capacity=st.integers(1, 6), residency=st.integers(0, 3))
    def create(self, capacity: int, residency: int) -> None:
        self.tail: Replacement = self.policy(capacity, residency)
        self.capacity, self.residency = capacity, residency
        self.slots: dict[int, int] = {}
        self.placed_at: dict[int, int] = {}
        self.step = 0

    @rule(token_ids=TOKENS)
    def insert(self, token_ids: list[int]) -> None:
        resident = set(self.slots.values())
        writes = self.tail.insert(token_ids)
        fresh = [token_id for token_id in dict.fromkeys(token_ids) if token_id not in resident]
        assert [write.token_id for write in writes] == fresh[: len(writes)]
        movable = [
            slot
            for slot, token_id in self.slots.items()
            if self.step - self.placed_at[slot] >= self.residency and token_id not in token_ids
        ]
        assert len(writes) == min(len(fresh), self.capacity - len(self.slots) + len(movable))
        for slot, token_id in writes:
            assert slot not in self.slots or slot in movable
            self.slots[slot], self.placed_at[slot] = token_id, self.step
        assert len({write.slot for write in writes}) == len(writes)

    @rule(token_ids=TOKENS)
    def touch(self, token_ids: list[int]) -> None:
        self.tail.touch(token_ids)
        self.step += 1

    @invariant()
    def agrees_with_model(self) -> None:
        slots = {slot: token_id for slot, token_id in enumerate(self.tail.token_ids.tolist()) if token_id >= 0}
        assert slots == self.slots
        assert sorted(self.tail.contents()) == sorted(self.slots.values())
        assert len(self.tail) == len(self.slots) <= self.capacity
        assert [token_id for token_id in range(15) if token_id in self.tail] == sorted(self.slots.values())

    @invariant()
    def contents_can_be_restored(self) -> None:
        restored = self.policy(self.capacity)
        restored.insert(self.tail.contents())
        assert restored.contents() == self.tail.contents()


class LruMachine(TailMachine):
    policy = LruReplacement


class ArcMachine(TailMachine):
    policy = ArcReplacement

    @initialize()
    def count_events(self) -> None:
        self.num_events = 0

    @rule(token_ids=TOKENS)
    def insert(self, token_ids: list[int]) -> None:
        self.num_events += bool(set(token_ids) - set(self.slots.values()))
        super().insert(token_ids)

    @rule()
    def many_events(self) -> None:
        """So that the target starts to move."""
        for event in range(FIXED_TARGET_EVENTS):
            self.insert([event % 15, (event * 7) % 15])
            self.touch([event % 4])

    @invariant()
    def is_bounded(self) -> None:
        assert isinstance(self.tail, ArcReplacement)
        assert max(self.tail.num_ghosts) <= self.capacity
        assert 0 <= self.tail.target <= self.capacity
        if self.num_events <= FIXED_TARGET_EVENTS:
            assert self.tail.target == self.capacity / 2


TestLru = LruMachine.TestCase
TestArc = ArcMachine.TestCase
TestLru.settings = TestArc.settings = settings(max_examples=50)


@pytest.mark.parametrize("policy", POLICIES)
def test_new_tokens_stay_for_eight_steps(policy: type[ArcReplacement]) -> None:
    tail = policy(2)
    tail.insert([1, 2])
    for _ in range(7):
        tail.touch([])
        assert tail.insert([3]) == []
    tail.touch([])
    (write,) = tail.insert([3])
    assert write.token_id == 3


@pytest.mark.parametrize("policy", POLICIES)
def test_more_than_fits_keeps_the_most_wanted(policy: type[ArcReplacement]) -> None:
    tail = policy(3)
    tail.insert([5, 4, 3, 2, 1])
    assert tail.contents() == [5, 4, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tail_has_slots(policy: type[ArcReplacement]) -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        policy(0)


def test_lru_evicts_what_was_longest_unused() -> None:
    tail = LruReplacement(3, min_residency=0)
    tail.insert([1, 2, 3])
    tail.touch([3])
    tail.insert([2])
    assert tail.insert([4]) == [(0, 4)]
    assert tail.insert([5]) == [(2, 5)]
    assert tail.contents() == [5, 4, 2]


def test_arc_keeps_used_tokens_through_a_scan() -> None:
    tail = ArcReplacement(8, min_residency=0)
    tail.insert([1, 2, 3, 4])
    tail.touch([1, 2, 3, 4])
    for token_id in range(100, 140):
        tail.insert([token_id])
    assert {2, 3, 4} <= set(tail.contents()), "the first one goes, while T1 has no more than its target"
    lru = LruReplacement(8, min_residency=0)
    lru.insert([1, 2, 3, 4])
    lru.touch([1, 2, 3, 4])
    for token_id in range(100, 140):
        lru.insert([token_id])
    assert not {1, 2, 3, 4} & set(lru.contents())


def test_arc_target_follows_the_ghosts_that_are_wanted_again() -> None:
    tail = ArcReplacement(8, min_residency=0)
    tail.insert([1, 2, 3, 4])
    tail.touch([1, 2, 3, 4])
    for token_id in range(100, 160):  # past the events for which the target is fixed
        tail.insert([token_id])
    assert tail.target == 4
    ghost = next(token_id for token_id in range(159, 99, -1) if token_id not in tail)
    tail.insert([ghost])
    assert tail.target == 5
    assert tail.contents()[0] == ghost, "a ghost that is wanted again counts as used"
