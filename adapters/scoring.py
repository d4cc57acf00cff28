"""How good weights are on segments that they were not trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from adapters.chains import ChainBatch, Chains, ChainStep, Weights, collate
from adapters.curriculum_loss import step_divergence
from adapters.records import Segment

_RANDOM_ROWS = 2048
_FEW_MORE = 0.1
_AT_ONCE = 4
"""Segments, which bounds how long the worker is away."""
_SEED = 20_260_527


@dataclass(frozen=True)
class Score:
    """What is known of each chain, [chains] each."""

    accepted: torch.Tensor
    """float32, tokens that name the target's most likely one before the first that does not, the text before each
    given: what a verification would accept"""
    losses: torch.Tensor
    """float32, KL of the first step. (Of all steps with the curriculum's weights, a draft that gets worse at the first
    would look better: its later ones would count less.)"""
    requests: torch.Tensor
    """int64, which request it is of; chains of one request are alike."""

    @property
    def agreement(self) -> float:
        """Mean of ``accepted``."""
        return float(self.accepted.mean())

    @property
    def loss(self) -> float:
        """Mean of ``losses``."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class _SegmentScore:
    """[chains] float32 each."""

    accepted: torch.Tensor
    losses: torch.Tensor


Known = WeakKeyDictionary[Segment, _SegmentScore]
"""Of one set of weights, what was found out before."""


class Memory:
    """Held-out segments stay for many scorings, and so do most weights: what is known of these is not computed again.

    The draft chooses among the tokens that target or draft preferred in any of the segments and a fixed sample of the
    others, not the whole vocabulary: a head of 150,000 rows would cost as much as an update. For all weights to be
    asked the same, these stay while anything is known, until new segments have brought many more.
    """

    def __init__(self) -> None:
        self.tokens = torch.zeros(0, dtype=torch.int64)
        """Ascending ids"""
        self.base = Known()
        """Under the base draft's weights."""
        self.current = Known()
        """Under those in force, if there are others."""

    def look_at(self, segments: Sequence[Segment], vocab_size: int) -> None:
        """Choose the tokens again if those for these segments have become many more."""
        generator = torch.Generator().manual_seed(_SEED)
        sample = torch.randint(0, vocab_size, (_RANDOM_ROWS,), generator=generator)
        wanted = torch.unique(torch.cat([*(ids for segment in segments for ids in _named(segment)), sample]))
        num_more = len(wanted) - int(torch.isin(wanted, self.tokens).sum())
        if num_more > _FEW_MORE * len(self.tokens):
            self.tokens = wanted
            self.base.clear()
            self.current.clear()


@dataclass(frozen=True)
class Side:
    """Weights to be compared; ``known`` grows."""

    weights: Weights
    known: Known


class Scoring:
    """A score for each side, on the same chains, some segments at a time: it takes longer than many updates.

    Args:
        chains: of the base draft.
        segments: at least one.
        sides: at least one.
        tokens: what they choose among, ascending ids; in each segment its own, too.
        horizon: steps of a chain.
    """

    def __init__(
        self,
        chains: Chains,
        segments: Sequence[Segment],
        sides: Sequence[Side],
        tokens: torch.Tensor,
        horizon: int,
    ) -> None:
        self._chains, self._segments, self._horizon = chains, segments, horizon
        self.sides, self._tokens = sides, tokens
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
            num_scored += self._score(self._segments[self._num_done])
            self._num_done += 1
        self.seconds += time.process_time() - started

    def scores(self) -> list[Score]:
        """One for each side."""
        return [_joined(self._segments, [side.known[segment] for segment in self._segments]) for side in self.sides]

    def _score(self, segment: Segment) -> bool:
        """Whether there was anything to do."""
        sides = [side for side in self.sides if segment not in side.known]
        if not sides:
            return False
        batch = collate([segment], self._horizon)
        tokens = torch.unique(torch.cat((batch.wanted_ids, self._tokens)))
        for side in sides:
            side.known[segment] = _segment_score(self._chains, batch, side.weights, tokens)
        return True


def _segment_score(chains: Chains, batch: ChainBatch, weights: Weights, tokens: torch.Tensor) -> _SegmentScore:
    accepted = torch.zeros(len(batch.starts))

    def is_right(step: ChainStep) -> torch.Tensor:
        """Where the draft names the target's most likely token; no chain needs to be followed beyond one where not."""
        right = (step.logits.argmax(-1) == step.columns[:, 0]) & step.mask
        accepted[step.chains] += right
        return right

    first = chains.steps(batch, weights, tokens, is_right)[0]
    losses = torch.zeros(len(batch.starts)).index_copy_(0, first.chains, step_divergence(first))
    return _SegmentScore(accepted, losses)


def _joined(segments: Sequence[Segment], of_segments: Sequence[_SegmentScore]) -> Score:
    numbers: dict[str, int] = {}
    requests = torch.tensor([numbers.setdefault(segment.request_id, len(numbers)) for segment in segments])
    counts = torch.tensor([len(score.accepted) for score in of_segments])
    accepted = torch.cat([score.accepted for score in of_segments])
    losses = torch.cat([score.losses for score in of_segments])
    return Score(accepted, losses, requests.repeat_interleave(counts))


def _named(segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids that the target thought likely or that were drafted and refused."""
    return segment.top_ids.flatten().long(), segment.refused[segment.refused >= 0].long()
