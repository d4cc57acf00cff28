"""From verify records and the rows of the feature ring to training samples.

A record alone is a few positions without what came before them, and a draft that attends to nothing does not draft as
it does in the engine. So the records of a request are joined again: a segment is a stretch of one answer, and each of
its positions is the start of a chain.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from engine.online.feature_ring import FeatureRingReader
from engine.online.verify_record import VerifyRecord
from kernels.session_options import NUM_FEATURES

_NO_TOKEN = -1
_MAX_UNFINISHED = 256
"""Requests joined at a time; the one silent longest ends first."""


@dataclass(frozen=True, eq=False)
class Segment:
    """n positions of one sequence in ascending order; some may be missing where records were lost or not kept.

    Row i is what the draft takes at ``positions[i]`` and what the target says of the token after it.
    """

    request_id: str
    positions: torch.Tensor  # [n] int64
    token_ids: torch.Tensor  # [n] int64, the token at each position
    inputs: torch.Tensor  # [n, width] bf16, features of the position before: as the ring has them, or fused
    top_ids: torch.Tensor  # [n, k] int32, the target's most likely next tokens
    top_logits: torch.Tensor  # [n, k] float16; -inf where there is no token, or the distribution is not known
    refused: torch.Tensor  # [n] int32, the token that was drafted next and refused, or -1
    anchors: torch.Tensor  # [n] bool: chains that start here are learned; the others are context
    prior: torch.Tensor  # [n, NUM_FEATURES] float16, the prior's weights that the engine drafted with; 0: without

    @property
    def num_anchors(self) -> int:
        return int(self.anchors.sum())


@dataclass
class _Unfinished:
    """A request's segment that is growing."""

    key: str
    context: Segment | None  # what was before the first record; every segment of the request begins with it
    parts: list[Segment] = field(default_factory=list)  # a segment of each record
    last_heard_at: float = 0.0


class Assembler:
    """Joins records to segments.

    Args:
        top_k: tokens of the target's distribution to keep.
        vocab_size: token ids from here on are of another model.
        segment_positions: a segment ends when it has so many, its request's context not counted.
        context_positions: at least so many of these, if there are, are the context of the next one.
        idle_seconds: a request that was silent so long is over.
    """

    def __init__(
        self, top_k: int, vocab_size: int, segment_positions: int, context_positions: int, idle_seconds: float = 5.0
    ) -> None:
        self._top_k, self._vocab_size = top_k, vocab_size
        self._segment_positions, self._context_positions = segment_positions, context_positions
        self._idle_seconds = idle_seconds
        self._unfinished: OrderedDict[str, _Unfinished] = OrderedDict()  # by request, the one silent longest first
        self.num_lapsed = 0  # records skipped because a feature row of theirs was overwritten
        self.num_unusable = 0  # records skipped because they have no sound features, or contradict themselves

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
            elif not inputs.float().square().sum().isfinite():  # one such segment held out would fail every version
                self.num_unusable += 1
            else:
                complete += self._join(key, record, inputs.clone(), teaches)
        return complete + self._end_silent()

    def flush(self) -> list[tuple[str, Segment]]:
        """End all segments, as if every request were over."""
        return [entry for request_id in list(self._unfinished) for entry in _finished(self._unfinished.pop(request_id))]

    def forget(self, key: str) -> None:
        """Drop the unfinished segments of a key."""
        for request_id in [request_id for request_id, each in self._unfinished.items() if each.key == key]:
            del self._unfinished[request_id]

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

    def _join(self, key: str, record: VerifyRecord, inputs: torch.Tensor, teaches: bool) -> list[tuple[str, Segment]]:
        """Put a record, with the inputs of its context and its own, at the end of its request's segment."""
        context, own = inputs.split_with_sizes([record.num_context, _num_rows(record)])
        unfinished = self._unfinished.get(record.request_id)
        if unfinished is None or unfinished.key != key:
            start = record.position - 1 - record.num_context
            before = self._unlabelled(record.request_id, start, record.context_ids().tolist(), context)
            unfinished = self._unfinished[record.request_id] = _Unfinished(key, before if len(context) else None)
        parts = unfinished.parts
        if parts and record.position - 1 <= parts[-1].positions[-1]:
            return []  # it was delivered twice
        parts.append(self._labelled(record, own, teaches))
        unfinished.last_heard_at = time.monotonic()
        self._unfinished.move_to_end(record.request_id)
        if sum(len(part.positions) for part in parts) < self._segment_positions:
            return []
        finished = _finished(unfinished)
        unfinished.parts = self._last_of(parts)
        return finished

    def _unlabelled(self, request_id: str, start: int, token_ids: list[int], inputs: torch.Tensor) -> Segment:
        """Positions at which the target's distribution is not known."""
        count = len(token_ids)
        return Segment(
            request_id,
            positions=torch.arange(start, start + count),
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            inputs=inputs,
            top_ids=torch.zeros(count, self._top_k, dtype=torch.int32),
            top_logits=torch.full((count, self._top_k), -torch.inf, dtype=torch.float16),
            refused=torch.full((count,), _NO_TOKEN, dtype=torch.int32),
            anchors=torch.zeros(count, dtype=torch.bool),
            prior=torch.zeros(count, NUM_FEATURES, dtype=torch.float16),
        )

    def _labelled(self, record: VerifyRecord, inputs: torch.Tensor, teaches: bool) -> Segment:
        count = len(inputs)
        token_ids = [record.last_token, *record.drafted[: record.num_accepted]][:count]
        part = self._unlabelled(record.request_id, record.position - 1, token_ids, inputs)
        ids, logits = record.top_k_arrays()
        steps, k = min(count, len(ids)), min(self._top_k, record.top_k)
        part.top_ids[:steps, :k] = torch.tensor(ids[:steps, :k])
        part.top_logits[:steps, :k] = torch.tensor(logits[:steps, :k])
        if record.num_accepted < min(len(record.drafted), count):
            part.refused[record.num_accepted] = record.drafted[record.num_accepted]
        if record.prior:
            part.prior[:] = torch.tensor(record.prior_weights())
        return replace(part, anchors=has_target(part.top_logits) & teaches)

    def _last_of(self, parts: Sequence[Segment]) -> list[Segment]:
        """The last parts, as context of what follows."""
        kept, first = 0, len(parts)
        while first > 0 and kept < self._context_positions:
            first -= 1
            kept += len(parts[first].positions)
        return [replace(part, anchors=torch.zeros_like(part.anchors)) for part in parts[first:]]

    def _end_silent(self) -> list[tuple[str, Segment]]:
        deadline = time.monotonic() - self._idle_seconds
        segments = []
        while self._unfinished:
            request_id, oldest = next(iter(self._unfinished.items()))
            if oldest.last_heard_at > deadline and len(self._unfinished) <= _MAX_UNFINISHED:
                break
            segments += _finished(self._unfinished.pop(request_id))
        return segments


def has_target(top_logits: torch.Tensor) -> torch.Tensor:
    """[..., k] → [...] bool: rows whose target distribution is known and sound."""
    return top_logits[..., 0].isfinite() & ~(top_logits.isnan() | (top_logits == torch.inf)).any(-1)


def _finished(unfinished: _Unfinished) -> list[tuple[str, Segment]]:
    """The segment that has grown, with its key, unless nothing in it teaches."""
    parts = unfinished.parts if unfinished.context is None else [unfinished.context, *unfinished.parts]
    if not any(part.num_anchors for part in parts):
        return []
    names = [each.name for each in fields(Segment) if each.name != "request_id"]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return [(unfinished.key, Segment(parts[0].request_id, **joined))]


def _num_rows(record: VerifyRecord) -> int:
    """Positions of a record that were accepted and have features: the last token before it, and accepted drafts."""
    return min(record.num_features, record.num_accepted + 1)


def _read_rows(
    records: Sequence[VerifyRecord], counts: Sequence[int], ring: FeatureRingReader
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the records' contexts and their own, ``counts`` of each, and which of them are what was written."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    firsts = torch.tensor([record.feature_slot - record.num_context for record in records], dtype=torch.int64)
    generations = torch.tensor([record.feature_generation for record in records], dtype=torch.int64)
    within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return ring.read(firsts.repeat_interleave(sizes) + within, generations.repeat_interleave(sizes))
