"""From verify records and the rows of the feature ring to training samples.

A record alone is a few positions without what came before them, and a draft that attends to nothing does not draft as
it does in the engine. So the records of a request are joined again: a segment is a stretch of one answer, and each of
its positions is the start of a chain.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.adapters_config import ReplayConfig
from evospec.engine.online.feature_ring import FeatureRingReader
from evospec.engine.online.verify_record import VerifyRecord
from evospec.kernels.session_options import NUM_FEATURES

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
    def num_rows(self) -> int:
        return len(self.positions)

    @property
    def num_anchors(self) -> int:
        return int(self.anchors.sum())


@dataclass(frozen=True, slots=True)
class _Part:
    """n positions in a row: those of a record, or of its context."""

    start: int
    token_ids: list[int]
    inputs: torch.Tensor  # [n, width]
    record: VerifyRecord | None = None  # what is known of the target's distribution there
    teaches: bool = False


@dataclass
class _Unfinished:
    """A request's segment that is growing."""

    key: str
    context: _Part | None  # what was before the first record; every segment of the request begins with it
    parts: list[_Part] = field(default_factory=list)  # one of each record
    num_positions: int = 0  # of the parts
    last_heard_at: float = 0.0

    @property
    def num_rows(self) -> int:
        """Positions, those of the context included."""
        return self.num_positions + (0 if self.context is None else len(self.context.token_ids))


class Assembler:
    """Joins records to segments.

    Args:
        config: sizes of segments; ``max_rows`` bounds what is not complete: beyond it the requests silent longest end.
        top_k: tokens of the target's distribution to keep.
        vocab_size: token ids from here on are of another model.
        max_positions: so are positions.
        idle_seconds: a request that was silent so long is over.
    """

    def __init__(
        self, config: ReplayConfig, top_k: int, vocab_size: int, max_positions: int, idle_seconds: float = 5.0
    ) -> None:
        self._config, self._idle_seconds = config, idle_seconds
        self._top_k, self._vocab_size, self._max_positions = top_k, vocab_size, max_positions
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
        are_finite = rows.float().square().sum(1).isfinite()  # one row that is not, held out, would fail every version
        self.num_unusable += len(records) - len(usable)
        complete = []
        for (key, record, teaches), inputs, is_valid, is_finite in zip(
            usable, *(torch.split_with_sizes(each, counts) for each in (rows, valid, are_finite)), strict=True
        ):
            if not is_valid.all():
                self.num_lapsed += 1
            elif not is_finite.all():
                self.num_unusable += 1
            else:
                complete += self._join(key, record, inputs.clone(), teaches)
        return complete + self._end_silent()

    @property
    def is_joining(self) -> bool:
        """Whether a request's records are here that may not be all."""
        return bool(self._unfinished)

    def flush(self) -> list[tuple[str, Segment]]:
        """End all segments, as if every request were over."""
        return [entry for request_id in list(self._unfinished) for entry in self._end(request_id)]

    def forget(self, key: str) -> None:
        for request_id in [request_id for request_id, each in self._unfinished.items() if each.key == key]:
            del self._unfinished[request_id]

    def _is_usable(self, record: VerifyRecord) -> bool:
        if record.position < 1 or not 0 <= record.num_accepted <= len(record.drafted) or _num_rows(record) < 1:
            return False
        if record.num_context > min(record.position - 1, record.feature_slot):
            return False
        if record.position + record.num_accepted > self._max_positions:
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
        start, request_id = record.position - 1, record.request_id
        unfinished = self._unfinished.get(request_id)
        if unfinished is None or unfinished.key != key:
            before = _Part(start - len(context), record.context_ids().tolist(), context) if len(context) else None
            unfinished = self._unfinished[request_id] = _Unfinished(key, before)
        parts = unfinished.parts
        if parts and start < parts[-1].start + len(parts[-1].token_ids):
            return []  # it was delivered twice
        token_ids = [record.last_token, *record.drafted[: record.num_accepted]][: len(own)]
        parts.append(_Part(start, token_ids, own, record, teaches))
        unfinished.num_positions += len(token_ids)
        unfinished.last_heard_at = time.monotonic()
        self._unfinished.move_to_end(request_id)
        if unfinished.num_positions < self._config.segment_positions:
            return []
        finished = self._finished(request_id, unfinished)
        unfinished.parts = self._last_of(parts)
        unfinished.num_positions = sum(len(part.token_ids) for part in unfinished.parts)
        return finished

    def _last_of(self, parts: Sequence[_Part]) -> list[_Part]:
        """The last parts, as context of what follows."""
        kept, first = 0, len(parts)
        while first > 0 and kept < self._config.context_positions:
            first -= 1
            kept += len(parts[first].token_ids)
        return [replace(part, teaches=False) for part in parts[first:]]

    def _end_silent(self) -> list[tuple[str, Segment]]:
        deadline = time.monotonic() - self._idle_seconds
        segments = []
        while self._unfinished:
            request_id, oldest = next(iter(self._unfinished.items()))
            num_rows = sum(each.num_rows for each in self._unfinished.values())
            is_bounded = len(self._unfinished) <= _MAX_UNFINISHED and num_rows <= self._config.max_rows
            if oldest.last_heard_at > deadline and is_bounded:
                break
            segments += self._end(request_id)
        return segments

    def _end(self, request_id: str) -> list[tuple[str, Segment]]:
        """A request is over."""
        return self._finished(request_id, self._unfinished.pop(request_id))

    def _finished(self, request_id: str, unfinished: _Unfinished) -> list[tuple[str, Segment]]:
        """The segment that has grown, with its key, unless nothing in it teaches."""
        parts = unfinished.parts if unfinished.context is None else [unfinished.context, *unfinished.parts]
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        count, k = len(token_ids), self._top_k
        top_ids, top_logits = np.zeros((count, k), np.int32), np.full((count, k), -np.inf, np.float16)
        refused, teaches = np.full(count, _NO_TOKEN, np.int32), np.zeros(count, np.bool_)
        prior = np.zeros((count, NUM_FEATURES), np.float16)
        first = 0
        for part in parts:
            rows, record = slice(first, first + len(part.token_ids)), part.record
            if record is not None:
                _label(record, top_ids[rows], top_logits[rows], refused[rows])
                teaches[rows] = part.teaches
                if record.prior:
                    prior[rows] = record.prior_weights()
            first = rows.stop
        anchors = has_target(torch.from_numpy(top_logits)) & torch.from_numpy(teaches)
        if not anchors.any():
            return []
        segment = Segment(
            request_id,
            positions=torch.cat([torch.arange(part.start, part.start + len(part.token_ids)) for part in parts]),
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            inputs=torch.cat([part.inputs for part in parts]),
            top_ids=torch.from_numpy(top_ids),
            top_logits=torch.from_numpy(top_logits),
            refused=torch.from_numpy(refused),
            anchors=anchors,
            prior=torch.from_numpy(prior),
        )
        return [(unfinished.key, segment)]


def has_target(top_logits: torch.Tensor) -> torch.Tensor:
    """[..., k] → [...] bool: rows whose target distribution is known and sound."""
    return top_logits[..., 0].isfinite() & ~(top_logits.isnan() | (top_logits == torch.inf)).any(-1)


def _label(
    record: VerifyRecord, top_ids: NDArray[np.int32], top_logits: NDArray[np.float16], refused: NDArray[np.int32]
) -> None:
    """Write what is known of a record's positions to their rows [n, k], [n, k] and [n]."""
    ids, logits = record.top_k_arrays()
    steps, k = min(len(top_ids), len(ids)), min(top_ids.shape[1], record.top_k)
    top_ids[:steps, :k] = ids[:steps, :k]
    top_logits[:steps, :k] = logits[:steps, :k]
    if record.num_accepted < min(len(record.drafted), len(refused)):
        refused[record.num_accepted] = record.drafted[record.num_accepted]


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
