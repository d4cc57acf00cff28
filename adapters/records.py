"""From verify records and the rows of the feature ring to training samples.

A record alone is a few positions without what came before them, and a draft that attends to nothing does not draft as
it does in the engine. So the records of a request are joined again: a segment is a stretch of one answer, and each of
its positions is the start of a chain.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.ipc.feature_ring import FeatureRingReader
from engine.ipc.verify_record import VerifyRecord
from engine.vocab.prior import NUM_FEATURES

_NO_TOKEN = -1
_NO_PRIOR = np.zeros(NUM_FEATURES, np.float16)
_TopIds = np.ndarray[tuple[int, int], np.dtype[np.int32]]
_TopLogits = np.ndarray[tuple[int, int], np.dtype[np.float16]]
_Weights = np.ndarray[tuple[int], np.dtype[np.float16]]


@dataclass(frozen=True, eq=False)
class Segment:
    """n positions of one sequence in ascending order; some may be missing where records were lost or not kept.

    Row i is what the draft takes at ``positions[i]`` and what the target says of the token after it.
    """

    request_id: str
    positions: torch.Tensor
    """[n] int64"""
    token_ids: torch.Tensor
    """[n] int64, the token at each position"""
    inputs: torch.Tensor
    """[n, width] bf16, features of the position before: as the ring has them, or fused"""
    top_ids: torch.Tensor
    """[n, k] int32, the target's most likely next tokens"""
    top_logits: torch.Tensor
    """[n, k] float16; -inf for places without a token, in all of a row whose target distribution is not known"""
    refused: torch.Tensor
    """[n] int32, the token that was drafted next and refused, or -1"""
    anchors: torch.Tensor
    """[n] bool: chains that start here are learned; the others are context"""
    prior: torch.Tensor
    """[n, NUM_FEATURES] float16, weights of the prior that the engine drafted with after each position; 0: without"""

    @property
    def num_anchors(self) -> int:
        return int(self.anchors.sum())


@dataclass
class _Rows:
    """A record's part of a segment; arrays of n rows as in ``Segment``."""

    start: int
    token_ids: list[int]
    inputs: torch.Tensor
    top_ids: _TopIds
    top_logits: _TopLogits
    refused: list[int]
    is_anchor: bool
    prior: _Weights
    """[NUM_FEATURES], of all rows"""


@dataclass
class _Open:
    """A request whose segment is growing."""

    key: str
    context: _Rows | None
    """What was before the first record; every segment of the request begins with it."""
    rows: list[_Rows] = field(default_factory=list)
    num_context: int = 0
    """How many of ``rows`` were in the segment before."""
    seen_at: float = 0.0

    @property
    def num_positions(self) -> int:
        return sum(len(rows.token_ids) for rows in self.rows)


class Assembler:
    """Joins records to segments.

    Args:
        prepare: from rows of the ring [n, width] to what segments keep, e.g. the draft's fusion of features.
        top_k: tokens of the target's distribution to keep.
        vocab_size: token ids from here on are of another model.
        segment_positions: a segment ends when it has so many, its request's context not counted.
        context_positions: at least so many of these, if there are, are the context of the next one.
        idle_seconds: a request that was silent so long is over.
        max_open: requests joined at a time; the one silent longest goes first.
        clock: for tests.
    """

    def __init__(
        self,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        top_k: int,
        vocab_size: int,
        segment_positions: int = 64,
        context_positions: int = 24,
        idle_seconds: float = 5.0,
        max_open: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prepare, self._top_k, self._vocab_size = prepare, top_k, vocab_size
        self._segment_positions, self._context_positions = segment_positions, context_positions
        self._idle_seconds, self._max_open, self._clock = idle_seconds, max_open, clock
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self.num_lapsed = 0
        """Records skipped because a feature row of theirs was overwritten."""
        self.num_unusable = 0
        """Records skipped because they have no features or damaged ones, contradict themselves, or name tokens that are
        not there."""

    def add(
        self, records: Sequence[tuple[str, VerifyRecord, bool]], ring: FeatureRingReader
    ) -> list[tuple[str, Segment]]:
        """Take in records, each with its adapter key and whether it teaches.

        Returns:
            the segments that are complete now, with their keys.

        Raises:
            SharedMemoryError: the ring is gone or damaged; nothing was taken in.
        """
        usable = [entry for entry in records if self._is_usable(entry[1])]
        counts = [record.num_context + _num_rows(record) for _, record, _ in usable]
        rows, valid = _read_rows([record for _, record, _ in usable], counts, ring)
        self.num_unusable += len(records) - len(usable)
        complete = []
        for (key, record, teaches), inputs, is_valid in zip(
            usable, torch.split_with_sizes(rows, counts), torch.split_with_sizes(valid, counts), strict=True
        ):
            if not is_valid.all():
                self.num_lapsed += 1
                continue
            if not inputs.float().square().sum().isfinite():  # one such segment held out would fail every version
                self.num_unusable += 1
                continue
            context, own = self._prepare(inputs).split_with_sizes([record.num_context, _num_rows(record)])
            unfinished = self._unfinished(key, record, context)
            complete += self._append(record.request_id, unfinished, self._rows_of(record, own, teaches))
        return complete + self._close_silent()

    def flush(self) -> list[tuple[str, Segment]]:
        """End all segments, as if every request were over."""
        return [entry for request_id in list(self._open) for entry in self._end(request_id)]

    def forget(self, key: str) -> None:
        """Drop the unfinished segments of a key."""
        for request_id in [request_id for request_id, unfinished in self._open.items() if unfinished.key == key]:
            del self._open[request_id]

    def _is_usable(self, record: VerifyRecord) -> bool:
        if record.position < 1 or not 0 <= record.num_accepted <= len(record.drafted) or _num_rows(record) < 1:
            return False
        if record.num_context > min(record.position - 1, record.feature_slot):
            return False
        prior = record.prior_weights()
        if len(prior) not in (0, NUM_FEATURES) or not np.isfinite(prior).all():
            return False
        tokens = (record.last_token, record.next_token, *record.drafted)
        in_vocabulary = all(0 <= token < self._vocab_size for token in tokens)
        ids = np.concatenate((record.top_k_arrays()[0].ravel(), record.context_ids()))
        return in_vocabulary and bool(((ids >= 0) & (ids < self._vocab_size)).all())

    def _rows_of(self, record: VerifyRecord, inputs: torch.Tensor, teaches: bool) -> _Rows:
        count = len(inputs)
        ids, logits = record.top_k_arrays()
        top_ids, top_logits = self._no_target(count)
        steps, k = min(count, len(ids)), min(self._top_k, record.top_k)
        top_ids[:steps, :k], top_logits[:steps, :k] = ids[:steps, :k], logits[:steps, :k]
        refused = [_NO_TOKEN] * count
        if record.num_accepted < min(len(record.drafted), count):
            refused[record.num_accepted] = record.drafted[record.num_accepted]
        token_ids = [record.last_token, *record.drafted[: record.num_accepted]][:count]
        prior = record.prior_weights() if record.prior else _NO_PRIOR
        return _Rows(record.position - 1, token_ids, inputs, top_ids, top_logits, refused, teaches, prior)

    def _no_target(self, count: int) -> tuple[_TopIds, _TopLogits]:
        """Of positions at which the target's distribution is not known."""
        return np.zeros((count, self._top_k), np.int32), np.full((count, self._top_k), -np.inf, np.float16)

    def _unfinished(self, key: str, record: VerifyRecord, context: torch.Tensor) -> _Open:
        """The segment that a record belongs to; ``context``: prepared inputs of what comes with the record."""
        unfinished = self._open.get(record.request_id)
        if unfinished is None or unfinished.key != key:
            before, count = None, record.num_context
            if count:
                start, no_tokens = record.position - 1 - count, [_NO_TOKEN] * count
                of_target = self._no_target(count)
                before = _Rows(start, record.context_ids().tolist(), context, *of_target, no_tokens, False, _NO_PRIOR)
            unfinished = self._open[record.request_id] = _Open(key, before)
        return unfinished

    def _append(self, request_id: str, unfinished: _Open, rows: _Rows) -> list[tuple[str, Segment]]:
        if unfinished.rows and rows.start < unfinished.rows[-1].start + len(unfinished.rows[-1].token_ids):
            return []  # it was delivered twice
        unfinished.rows.append(rows)
        unfinished.seen_at = self._clock()
        self._open.move_to_end(request_id)
        if unfinished.num_positions < self._segment_positions:
            return []
        segments = self._segment(request_id, unfinished)
        self._keep_context(unfinished)
        return segments

    def _keep_context(self, unfinished: _Open) -> None:
        kept = 0
        first = len(unfinished.rows)
        while first > 0 and kept < self._context_positions:
            first -= 1
            kept += len(unfinished.rows[first].token_ids)
        del unfinished.rows[:first]
        unfinished.num_context = len(unfinished.rows)

    def _close_silent(self) -> list[tuple[str, Segment]]:
        deadline = self._clock() - self._idle_seconds
        segments = []
        while self._open:
            request_id, oldest = next(iter(self._open.items()))
            if oldest.seen_at > deadline and len(self._open) <= self._max_open:
                break
            segments += self._end(request_id)
        return segments

    def _end(self, request_id: str) -> list[tuple[str, Segment]]:
        return self._segment(request_id, self._open.pop(request_id))

    def _segment(self, request_id: str, unfinished: _Open) -> list[tuple[str, Segment]]:
        """What has grown, unless nothing in it teaches."""
        before = [unfinished.context] if unfinished.context else []
        rows, new = before + unfinished.rows, len(before) + unfinished.num_context
        if not any(part.is_anchor for part in rows[new:]):
            return []
        top_logits = torch.from_numpy(np.concatenate([part.top_logits for part in rows]))
        is_anchor = [part.is_anchor and index >= new for index, part in enumerate(rows) for _ in part.token_ids]
        segment = Segment(
            request_id=request_id,
            positions=torch.cat([part.start + torch.arange(len(part.token_ids)) for part in rows]),
            token_ids=torch.tensor([token for part in rows for token in part.token_ids]),
            inputs=torch.cat([part.inputs for part in rows]),
            top_ids=torch.from_numpy(np.concatenate([part.top_ids for part in rows])),
            top_logits=top_logits,
            refused=torch.tensor([token for part in rows for token in part.refused], dtype=torch.int32),
            anchors=torch.tensor(is_anchor) & has_target(top_logits),
            prior=torch.from_numpy(np.stack([part.prior for part in rows for _ in part.token_ids])),
        )
        return [(unfinished.key, segment)] if segment.num_anchors else []


def has_target(top_logits: torch.Tensor) -> torch.Tensor:
    """[n, k] → [n] bool: rows whose target distribution is known and sound."""
    return top_logits[:, 0].isfinite() & ~(top_logits.isnan() | (top_logits == torch.inf)).any(-1)


def _num_rows(record: VerifyRecord) -> int:
    """Positions of a record that were accepted and have features: the last token before it, and accepted drafts."""
    return min(record.num_features, record.num_accepted + 1)


def _read_rows(
    records: Sequence[VerifyRecord], counts: Sequence[int], ring: FeatureRingReader
) -> tuple[torch.Tensor, torch.Tensor]:
    slots = [
        record.feature_slot - record.num_context + row
        for record, count in zip(records, counts, strict=True)
        for row in range(count)
    ]
    generations = [
        record.feature_generation for record, count in zip(records, counts, strict=True) for _ in range(count)
    ]
    return ring.read(torch.tensor(slots, dtype=torch.int64), torch.tensor(generations, dtype=torch.int64))
