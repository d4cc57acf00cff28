"""How good weights are on segments that they were not trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters.chains import Chains, collate
from adapters.curriculum_loss import CurriculumLoss
from adapters.records import Segment

_RANDOM_ROWS = 2048
_AT_ONCE = 4
"""Segments, which bounds how long the worker is away."""
_SEED = 20_260_527


@dataclass(frozen=True)
class Score:
    """Mean over chains.

    ``agreement``: tokens of a chain that name the target's most likely one before the first that does not, the text
    before each given; what a verification would accept. ``loss``: KL of all steps, each the same weight. (With the
    curriculum's weights a draft that gets worse at the first step would look better, since its later ones would count
    less.)
    """

    agreement: float
    loss: float
    accepted: torch.Tensor
    """[chains] float32, of which ``agreement`` is the mean"""
    requests: torch.Tensor
    """[chains] int64, which request each chain is of; chains of one request are alike."""


@dataclass(frozen=True)
class _SegmentScore:
    accepted: torch.Tensor
    """[chains] float32"""
    loss: float
    """Sum over chains."""


Known = dict[Segment, _SegmentScore]
"""Of one set of weights, what was found out before: held-out segments stay for many scorings."""


@dataclass(frozen=True)
class Side:
    """Weights to be compared, by name, in place of the base draft's; ``known`` grows."""

    weights: Mapping[str, torch.Tensor]
    known: Known


class Scoring:
    """A score for each side, on the same chains, some segments at a time: it takes longer than many updates.

    The draft chooses among all tokens that target or draft ever preferred in a segment and a fixed sample of the
    others, not the whole vocabulary: a head of 150,000 rows would cost as much as an update.

    Args:
        chains: of the base draft.
        segments: at least one.
        sides: what is known of other segments is dropped.
        horizon: steps of a chain.
    """

    def __init__(self, chains: Chains, segments: Sequence[Segment], sides: Sequence[Side], horizon: int) -> None:
        self._chains, self._segments, self._sides, self._horizon = chains, segments, sides, horizon
        vocab, generator = len(chains.target.head), torch.Generator().manual_seed(_SEED)
        self._sample = torch.randint(0, vocab, (_RANDOM_ROWS,), generator=generator)
        self._num_done = 0
        self.seconds = 0.0
        """What it took so far, of this process."""

    @property
    def is_done(self) -> bool:
        """Whether there are ``scores``."""
        return self._num_done >= len(self._segments)

    @torch.no_grad()
    def go_on(self) -> None:
        """Score the next few segments that are not known yet."""
        started, num_scored = time.process_time(), 0
        while not self.is_done and num_scored < _AT_ONCE:
            segment = self._segments[self._num_done]
            num_scored += self._score(segment)
            self._num_done += 1
        self.seconds += time.process_time() - started

    def scores(self) -> list[Score]:
        """One for each side."""
        requests = _requests(self._segments)
        return [self._score_of(side.known, requests) for side in self._sides]

    def _score(self, segment: Segment) -> bool:
        """Whether there was anything to do."""
        sides = [side for side in self._sides if segment not in side.known]
        if not sides:
            return False
        batch, loss = collate([segment], self._horizon), CurriculumLoss(beta=0.0)
        token_ids = torch.unique(torch.cat((batch.wanted_ids, self._sample)))
        for side in sides:
            logits, columns = self._chains.logits(batch, side.weights, token_ids)
            hits = (logits.argmax(-1) == columns[..., 0]) & batch.mask
            of_chains = float(loss(logits, columns, batch.top_logits, batch.mask)) * len(batch.starts)
            side.known[segment] = _SegmentScore(hits.float().cumprod(-1).sum(-1), of_chains)
        return True

    def _score_of(self, known: Known, requests: torch.Tensor) -> Score:
        kept = {segment: known[segment] for segment in self._segments}
        known.clear()
        known.update(kept)
        accepted = torch.cat([score.accepted for score in kept.values()])
        loss = sum(score.loss for score in kept.values()) / len(accepted)
        return Score(float(accepted.mean()), loss, accepted, requests)


def _requests(segments: Sequence[Segment]) -> torch.Tensor:
    """Of each chain, in the order of ``collate``, a number of the request that it is of."""
    numbers: dict[str, int] = {}
    of_segment = [numbers.setdefault(segment.request_id, len(numbers)) for segment in segments]
    counts = [segment.num_anchors for segment in segments]
    return torch.tensor(of_segment).repeat_interleave(torch.tensor(counts))
