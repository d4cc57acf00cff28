"""How good weights are on segments that they were not trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from evospec.adapters.alignment.chains import ChainDrafter, ChainStep, SegmentBatch, collate
from evospec.adapters.alignment.curriculum_loss import step_divergence
from evospec.adapters.alignment.records import Segment

_RANDOM_ROWS = 2048
_FEW_MORE = 0.1
_AT_ONCE = 4
"""Segments, which bounds how long the worker is away."""
_SEED = 20_260_527


@dataclass(frozen=True)
class Score:
    """What is known of each chain, [chains] each.

    ``accepted`` is what a verification would accept: tokens that name the target's most likely one before the first
    that does not, the text before each given. ``losses`` are those of the first step alone: with all steps and the
    curriculum's weights, a draft that gets worse at the first would look better, since its later ones count less.
    """

    accepted: torch.Tensor  # float32
    losses: torch.Tensor  # float32, KL
    requests: torch.Tensor  # int64, which request it is of; chains of one request are alike

    def by_acceptance(self) -> Score:
        """The same with another loss: minus the logarithm of the tokens that a verification makes.

        For a draft that is trained from nothing: unrolled, its later steps get better at the cost of the first.
        """
        return replace(self, losses=-torch.log1p(self.accepted))

    @property
    def agreement(self) -> float:
        """Mean of ``accepted``."""
        return float(self.accepted.mean())

    @property
    def loss(self) -> float:
        """Mean of ``losses``."""
        return float(self.losses.mean())


KnownScores = WeakKeyDictionary[Segment, tuple[torch.Tensor, torch.Tensor]]
"""``accepted`` and ``losses`` of each segment that one set of weights was scored on."""


class ScoreCache:
    """What is known of held-out segments, most of which stay for many scorings, and of weights, most of which do too.

    The draft chooses among the tokens that target or draft preferred in any of the segments and a fixed sample of the
    others, not the whole vocabulary: a head of 150,000 rows would cost as much as an update. For all weights to be
    asked the same, these stay while anything is known, until new segments have brought many more.
    """

    def __init__(self) -> None:
        self.tokens = torch.zeros(0, dtype=torch.int64)  # ascending ids that the draft chooses among
        self.base = KnownScores()  # scores of the base draft
        self.current = KnownScores()  # scores of the weights in force, if they are others
        self.candidate = KnownScores()  # scores of the weights that are scored now

    def choose_tokens(self, segments: Sequence[Segment], vocab_size: int) -> None:
        """Choose the tokens again if those for these segments have become many more."""
        generator = torch.Generator().manual_seed(_SEED)
        sample = torch.randint(0, vocab_size, (_RANDOM_ROWS,), generator=generator)
        named = [segment.top_ids.flatten().long() for segment in segments]
        named += [segment.refused[segment.refused >= 0].long() for segment in segments]
        wanted = torch.unique(torch.cat([*named, sample]))
        num_more = len(wanted) - int(torch.isin(wanted, self.tokens).sum())
        if num_more > _FEW_MORE * len(self.tokens):
            self.tokens = wanted
            self.base.clear()
            self.current.clear()


class Scoring:
    """A score for each of some drafters, on the same chains, a few segments at a time: it takes longer than an update.

    Args:
        segments: at least one.
        drafters: those to compare, each with what is known of it, which grows.
        tokens: what they choose among, ascending ids; in each segment its own, too.
        horizon: steps of a chain.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        drafters: Sequence[tuple[ChainDrafter, KnownScores]],
        tokens: torch.Tensor,
        horizon: int,
    ) -> None:
        self._segments, self._drafters, self._tokens, self._horizon = segments, drafters, tokens, horizon
        self._num_done = 0
        self.seconds = 0.0  # CPU time of this process that it took so far

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
        """One score for each drafter."""
        numbers: dict[str, int] = {}
        of_segment = [numbers.setdefault(segment.request_id, len(numbers)) for segment in self._segments]
        requests = torch.tensor(of_segment).repeat_interleave(torch.tensor([s.num_anchors for s in self._segments]))
        found = [list(zip(*(known[segment] for segment in self._segments), strict=True)) for _, known in self._drafters]
        return [Score(torch.cat(accepted), torch.cat(losses), requests) for accepted, losses in found]

    def _score(self, segment: Segment) -> bool:
        """Whether there was anything to do."""
        drafters = [(drafter, known) for drafter, known in self._drafters if segment not in known]
        if not drafters:
            return False
        batch = collate([segment], self._horizon)
        tokens = torch.unique(torch.cat((batch.wanted_ids, self._tokens)))
        for drafter, known in drafters:
            known[segment] = _score_chains(drafter, batch, tokens)
        return True


def _score_chains(
    drafter: ChainDrafter, batch: SegmentBatch, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    accepted = torch.zeros(len(batch.starts))

    def is_right(step: ChainStep) -> torch.Tensor:
        """Where the draft names the target's most likely token; no chain needs to be followed beyond one where not."""
        right = (step.logits.argmax(-1) == step.columns[:, 0]) & step.mask
        accepted[step.chains] += right
        return right

    first = drafter.steps(batch, tokens, is_right)[0]
    return accepted, torch.zeros(len(batch.starts)).index_copy_(0, first.chains, step_divergence(first))
