"""What the worker remembers of one key's traffic: recent segments, a sample of those before, and held-out ones."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict, deque
from collections.abc import Collection

from evospec.adapters.alignment.records import Segment
from evospec.engine.adapters_config import ReplayConfig
from evospec.engine.online.verify_record import VerifyRecord

_HASH_RANGE = 2**32
_REQUESTS = 1024
"""Requests of which is remembered whether they are held out: more than are answered at a time."""
_SHORT_SEGMENT = 8
"""Positions; of segments as short as that there may be more."""


def teaches(record: VerifyRecord, kl_threshold: float, sampled_share: float) -> bool:
    """Whether a verify step is worth learning from: a hard example, or drawn by lot, the same for the same record."""
    return record.teaches(kl_threshold) or _hash(f"{record.request_id}:{record.position}") < sampled_share


def starts_chains(record: VerifyRecord, is_teaching: bool, is_held_out: bool) -> bool:
    """Whether a record's positions are starts of chains, to be learned from or to score by.

    Those to learn from are what teaches. Scores are over the unbiased sample: what teaches is mostly where the draft in
    force was wrong, and there any other looks better.
    """
    return not record.is_hard_example if is_held_out else is_teaching


class ReplayBuffer:
    """A bounded memory for each adapter key.

    It has at most ``max_rows`` positions, contexts counted: half of them held out, a quarter recent. Segments leave
    ``recent`` in their order, and of all that left each has an equal chance to be in ``history`` (reservoir sampling).
    """

    def __init__(self, config: ReplayConfig, seed: int = 0) -> None:
        self._config = config
        self._random = random.Random(seed)
        self._recent: deque[Segment] = deque()
        self._new: deque[Segment] = deque()
        self._history: list[Segment] = []
        self._num_left = 0
        self._num_requests = 0
        self._are_held_out: OrderedDict[str, bool] = OrderedDict()  # of the requests heard last
        self.held_out: deque[Segment] = deque()  # the most recent of the held-out requests' segments
        self.num_arrived_positions = 0
        """Positions that came since the last ``take``, whether they are still here or not; held-out ones not."""

    @property
    def num_new_positions(self) -> int:
        """Positions that no update has taken yet."""
        return sum(segment.num_anchors for segment in self._new)

    @property
    def num_segments(self) -> int:
        """Segments that may be learned from."""
        return len(self._recent) + len(self._history)

    @property
    def num_held_out_positions(self) -> int:
        return sum(segment.num_anchors for segment in self.held_out)

    @property
    def has_older(self) -> bool:
        """Whether there is anything for ``take_older``."""
        return bool(self._older())

    def holds_out(self, request_id: str) -> bool:
        """Whether a request is for scoring, never for training: one by lot of each five, say, first asked about."""
        is_held_out = self._are_held_out.get(request_id)
        if is_held_out is None:
            period = round(1 / self._config.held_out_share)
            group, place = divmod(self._num_requests, period)
            self._num_requests += 1
            is_held_out = place == int(_hash(str(group)) * period)
        self._decide(request_id, is_held_out)
        return is_held_out

    def keep_in_training(self, request_id: str) -> None:
        """Never hold out a request, which takes no part in the lot."""
        self._decide(request_id, False)

    def add(self, segment: Segment) -> None:
        """Remember a segment, and forget another when there are too many."""
        if self.holds_out(segment.request_id):
            self.held_out.append(segment)
            self._forget_held_out()
            return
        self.num_arrived_positions += segment.num_anchors
        self._recent.append(segment)
        self._new.append(segment)
        config = self._config
        while len(self._recent) > config.recent_segments or _is_over(self._recent, config.max_rows // 4):
            oldest = self._recent.popleft()
            if self._new[0] is oldest:
                self._new.popleft()
            self._to_history(oldest)

    def take(self, num_positions: int, history_share: float) -> list[Segment]:
        """Segments for an update, of about ``num_positions`` chains; empty without anything new.

        New ones first, in their order; ``history_share`` of the positions are of older segments.
        """
        if not self._new:
            return []
        self.num_arrived_positions = 0
        num_older = round(num_positions * history_share)
        older = self.take_older(num_older)
        num_new = num_positions - (num_older if older else 0)
        batch = []
        while self._new and num_new > 0:
            batch.append(self._new.popleft())
            num_new -= batch[-1].num_anchors
        return [*batch, *older]

    def take_older(self, num_positions: int) -> list[Segment]:
        """Segments of about ``num_positions`` chains, by lot, among those that an update has taken before."""
        older, batch = self._older(), list[Segment]()
        while num_positions > 0 and older:
            batch.append(older.pop(self._random.randrange(len(older))))
            num_positions -= batch[-1].num_anchors
        return batch

    def clear(self) -> None:
        for kept in (self._recent, self._new, self._history, self.held_out):
            kept.clear()
        self._num_left = self.num_arrived_positions = 0

    def _decide(self, request_id: str, is_held_out: bool) -> None:
        """Remember it of a request, and forget what was decided of the one asked about longest ago."""
        self._are_held_out[request_id] = is_held_out
        self._are_held_out.move_to_end(request_id)
        if len(self._are_held_out) > _REQUESTS:
            self._are_held_out.popitem(last=False)

    def _forget_held_out(self) -> None:
        """More than there should be stay where they are short, or a key with short answers would never be scored."""
        left, most = self.num_held_out_positions, self._config.held_out_segments
        while len(self.held_out) > most and left - self.held_out[0].num_anchors >= _SHORT_SEGMENT * most:
            left -= self.held_out.popleft().num_anchors
        while _is_over(self.held_out, self._config.max_rows // 2):
            self.held_out.popleft()

    def _older(self) -> list[Segment]:
        return [*self._history, *(s for s in self._recent if all(s is not new for new in self._new))]

    def _to_history(self, segment: Segment) -> None:
        room = self._config.max_rows - _num_rows(self._recent) - _num_rows(self.held_out)
        self._num_left += 1
        if len(self._history) < self._config.history_segments and _num_rows(self._history) + segment.num_rows <= room:
            self._history.append(segment)
        elif (place := self._random.randrange(self._num_left)) < len(self._history):
            self._history[place] = segment
        while self._history and _num_rows(self._history) > room:
            self._history.pop(self._random.randrange(len(self._history)))


def _num_rows(segments: Collection[Segment]) -> int:
    return sum(segment.num_rows for segment in segments)


def _is_over(segments: Collection[Segment], max_rows: int) -> bool:
    """Whether several segments have more rows than they may."""
    return len(segments) > 1 and _num_rows(segments) > max_rows


def _hash(text: str) -> float:
    """A number in [0, 1) that looks drawn by lot, the same for the same text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) / _HASH_RANGE
