"""Which tokens live in the tail of a draft vocabulary.

EvoSpec (arXiv 2605.27390) keeps its dynamic buffer by ARC (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead
Replacement Cache", FAST 2003). Least recently used is here to be measured against it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

MIN_RESIDENCY = 8
"""Verified steps for which a new token cannot be evicted (the paper's)."""
FIXED_TARGET_EVENTS = 50
"""Insertions during which ARC's target size stays at half of the slots (the paper's)."""


class SlotWrite(NamedTuple):
    """A slot's new token; whatever was there is gone."""

    slot: int
    token_id: int


class _Tail(ABC):
    """Slots and residency, common to all policies: a token keeps its slot for as long as it stays."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._slot_of: dict[int, int] = {}
        self._placed_at = [0] * capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._step = 0

    def insert(self, token_ids: Sequence[int]) -> list[SlotWrite]:
        """Tokens that retrieval wants, the most wanted first; all that fit are resident afterwards.

        Those that are resident already are refreshed. None that is named evicts another that is named, and none is
        evicted before it has been there for the minimum residency; what then does not fit is left out.
        """
        named = dict.fromkeys(token_ids)
        writes = []
        self._begin(named)
        for token_id in named:
            if token_id in self._slot_of:
                continue
            slot = self._free.pop() if self._free else self._evict_for(token_id, named)
            if slot is None:
                break
            self._slot_of[token_id] = slot
            self._placed_at[slot] = self._step
            self._placed(token_id)
            writes.append(SlotWrite(slot, token_id))
        for token_id in reversed(named):  # so that the most wanted is the most recent
            if token_id in self._slot_of:
                self._retrieved(token_id)
        return writes

    def touch(self, token_ids: Iterable[int]) -> None:
        """Tokens that verification produced. One call a verified step, be it empty: it is the clock of residency."""
        self._step += 1
        for token_id in token_ids:
            if token_id in self._slot_of:
                self._used(token_id)

    @abstractmethod
    def contents(self) -> list[int]:
        """The tokens, the most worth keeping first; ``insert`` of them into an empty tail gives the same order."""

    def _may_go(self, token_id: int, named: Collection[int]) -> bool:
        """Whether a resident token may be evicted now."""
        return self._step - self._placed_at[self._slot_of[token_id]] >= MIN_RESIDENCY and token_id not in named

    def _begin(self, named: Collection[int]) -> None:  # noqa: B027 - a hook that most policies have no use for
        """An insertion starts."""

    @abstractmethod
    def _evict_for(self, token_id: int, named: Collection[int]) -> int | None:
        """Drop a token for one that is not resident; returns the slot, None if none may go."""

    @abstractmethod
    def _placed(self, token_id: int) -> None:
        """A token has got its slot."""

    @abstractmethod
    def _retrieved(self, token_id: int) -> None:
        """A resident token was named by an insertion, maybe the one that placed it."""

    @abstractmethod
    def _used(self, token_id: int) -> None:
        """Verification produced a resident token."""


class LruReplacement(_Tail):
    """Evicts the token that was neither used nor retrieved for longest."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def contents(self) -> list[int]:
        return list(reversed(self._order))

    def _evict_for(self, token_id: int, named: Collection[int]) -> int | None:
        victim = next((token for token in self._order if self._may_go(token, named)), None)
        if victim is None:
            return None
        del self._order[victim]
        return self._slot_of.pop(victim)

    def _placed(self, token_id: int) -> None:
        self._order[token_id] = None

    def _retrieved(self, token_id: int) -> None:
        self._order.move_to_end(token_id)

    def _used(self, token_id: int) -> None:
        self._order.move_to_end(token_id)


class ArcReplacement(_Tail):
    """ARC as in the paper: tokens retrieved (T1) and tokens verified or missed (T2), each with a list of ghosts.

    Both lists of ghosts hold up to ``capacity`` tokens that were evicted. A ghost that is wanted again moves the target
    size of T1, except in the first ``FIXED_TARGET_EVENTS`` insertions, and enters T2.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._frequent: OrderedDict[int, None] = OrderedDict()
        self._recent_ghosts: OrderedDict[int, None] = OrderedDict()
        self._frequent_ghosts: OrderedDict[int, None] = OrderedDict()
        self._target = capacity / 2
        self._num_events = 0

    def contents(self) -> list[int]:
        return [*reversed(self._frequent), *reversed(self._recent)]

    def _begin(self, named: Collection[int]) -> None:
        self._num_events += any(token_id not in self._slot_of for token_id in named)

    def _evict_for(self, token_id: int, named: Collection[int]) -> int | None:
        self._adapt(token_id)
        was_frequent = token_id in self._frequent_ghosts
        lists = [(self._recent, self._recent_ghosts), (self._frequent, self._frequent_ghosts)]
        if not (len(self._recent) > self._target or (was_frequent and len(self._recent) >= self._target)):
            lists.reverse()
        for residents, ghosts in lists:
            victim = next((token for token in residents if self._may_go(token, named)), None)
            if victim is not None:
                del residents[victim]
                ghosts[victim] = None
                if len(ghosts) > self._capacity:
                    ghosts.popitem(last=False)
                return self._slot_of.pop(victim)
        return None

    def _adapt(self, token_id: int) -> None:
        """Move the target towards the list whose ghost is wanted, faster if its ghosts are the fewer."""
        if self._num_events <= FIXED_TARGET_EVENTS:
            return
        num_recent, num_frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if token_id in self._recent_ghosts:
            self._target = min(self._target + max(num_frequent / num_recent, 1.0), float(self._capacity))
        elif token_id in self._frequent_ghosts:
            self._target = max(self._target - max(num_recent / num_frequent, 1.0), 0.0)

    def _placed(self, token_id: int) -> None:
        was_ghost = token_id in self._recent_ghosts or token_id in self._frequent_ghosts
        self._recent_ghosts.pop(token_id, None)
        self._frequent_ghosts.pop(token_id, None)
        (self._frequent if was_ghost else self._recent)[token_id] = None

    def _retrieved(self, token_id: int) -> None:
        (self._recent if token_id in self._recent else self._frequent).move_to_end(token_id)

    def _used(self, token_id: int) -> None:
        self._recent.pop(token_id, None)
        self._frequent[token_id] = None
        self._frequent.move_to_end(token_id)
