"""How many tokens to draft for each sequence of a step: as many as make tokens come fastest, down to none.

The rate of a step is (1 + expected accepted drafts, summed over sequences) / (verify time + draft time). The times come
from a table measured at start-up, the chance that a draft is accepted from what verification has shown so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.config import MAX_SPECULATIVE_TOKENS

_MIN_GAIN = 1.03
"""Drafting must promise this many times the rate without it: costs are estimates."""
_MAX_ACCEPTANCE = 0.98
_PRIOR_ACCEPTANCE, _PRIOR_TRIALS = 0.7, 10.0
"""Optimistic, so that a new draft is tried."""
_ENGINE_MEMORY = 0.995
"""Weight of the past in the engine's acceptance, for each trial."""
_SEQUENCE_MEMORY = 0.9
"""The same in a sequence's own, for each verified step."""
_IDLE_MEMORY = 0.98
"""The same for each step without a draft: an old failure is forgotten, and the sequence tried again."""
_SEQUENCE_PRIOR = 2.0
_IDLE_INTERVAL = 16
"""Where nothing has been drafted for some steps, lengths are worked out so seldom, until the batch changes."""
_PROBE_INTERVAL, _PROBE_STEPS, _PROBE_TOKENS = 256, 8, 2
"""Where nothing is drafted, every so many steps one sequence is for some steps, to see whether that is still right."""


class Curve:
    """Seconds by a number of tokens or sequences: linear between measured points and past the last.

    Fewer never cost more: where it was measured so, something else had the processor then.
    """

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self._sizes = [float(size) for size, _ in points]
        self._seconds = np.minimum.accumulate([seconds for _, seconds in points][::-1])[::-1].tolist()
        self._table: list[float] = []

    def __call__(self, size: int) -> float:
        if size >= len(self._table):
            self._extend(2 * size + 1)
        return self._table[size]

    def _extend(self, length: int) -> None:
        sizes = np.arange(length)
        table = np.interp(sizes, self._sizes, self._seconds)
        if len(self._sizes) > 1:
            slope = (self._seconds[-1] - self._seconds[-2]) / (self._sizes[-1] - self._sizes[-2])
            table += np.maximum(sizes - self._sizes[-1], 0) * max(slope, 0.0)
        self._table = table.tolist()


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of a step."""

    verify: Curve
    """By tokens: the target's forward pass, its choices, and what is kept of it for later drafts."""
    first_draft: Curve
    """By sequences: the first draft token of each, and what its vocabulary learns of what became of it."""
    next_draft: Curve
    """By sequences: each further draft token."""

    def milliseconds(self, sizes: Sequence[int]) -> dict[str, dict[int, float]]:
        """All three at some sizes, to be read."""
        curves = {"verify": self.verify, "first_draft": self.first_draft, "next_draft": self.next_draft}
        return {name: {size: round(1e3 * curve(size), 3) for size in sizes} for name, curve in curves.items()}


@dataclass(slots=True)
class _Ratio:
    """How a sequence's drafts fare against the engine's average: accepted / expected, with fading memory."""

    accepted: float = 0.0
    expected: float = 0.0

    @property
    def value(self) -> float:
        return (self.accepted + _SEQUENCE_PRIOR) / (self.expected + _SEQUENCE_PRIOR)

    def fade(self, memory: float) -> None:
        self.accepted *= memory
        self.expected *= memory


@dataclass(slots=True)
class _Acceptance:
    """Chance that the draft at each place is accepted, given that those before it were; over all sequences."""

    accepted: list[float] = field(default_factory=lambda: [_PRIOR_ACCEPTANCE * _PRIOR_TRIALS] * MAX_SPECULATIVE_TOKENS)
    trials: list[float] = field(default_factory=lambda: [_PRIOR_TRIALS] * MAX_SPECULATIVE_TOKENS)

    def __getitem__(self, place: int) -> float:
        return self.accepted[place] / self.trials[place]

    def observe(self, place: int, accepted: bool) -> None:
        self.accepted[place] = self.accepted[place] * _ENGINE_MEMORY + accepted
        self.trials[place] = self.trials[place] * _ENGINE_MEMORY + 1.0


class AdaptiveLength:
    """A ``LengthPolicy`` that maximises the expected rate of tokens. Deterministic: it reads no clock."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._acceptance = _Acceptance()
        self._ratios: dict[str, _Ratio] = {}
        self._idle_steps = 0
        self._idle_batch: tuple[list[str], int] | None = None
        """The sequences, and how many join them, for whom no draft was found to pay; nothing was observed since."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing has been drafted for some steps."""
        return self._idle_steps >= _PROBE_STEPS

    def lengths(self, request_ids: Sequence[str], limits: Sequence[int], num_joining: int) -> list[int]:
        """The best lengths by what is known; while that is none at all, a short probe now and then.

        Best for the batch as it will be with those that join: before its first draft a sequence's whole text has to be
        read, which does not pay where it would be drafted for only until the others' prompts are computed.
        """
        ratios = [self._ratios.setdefault(request_id, _Ratio()) for request_id in request_ids]
        batch = (list(request_ids), num_joining)
        if self.is_idle and batch == self._idle_batch and self._idle_steps % _IDLE_INTERVAL:
            lengths = [0] * len(ratios)
        else:
            chances = [self._chances(ratio.value, limit) for ratio, limit in zip(ratios, limits, strict=True)]
            lengths = best_lengths(self._costs, chances + [[]] * num_joining)[: len(chances)]
            self._idle_batch = None if any(lengths) else batch
        if any(lengths):
            self._idle_steps = 0
        else:
            self._idle_steps += 1
            self._probe(lengths, limits)
        for ratio, length in zip(ratios, lengths, strict=True):
            if length == 0:
                ratio.fade(_IDLE_MEMORY)
        return lengths

    def observe(self, request_id: str, num_drafted: int, num_accepted: int) -> None:
        """Each draft token up to the first that was refused is one trial at its place."""
        self._idle_batch = None
        ratio = self._ratios.setdefault(request_id, _Ratio())
        ratio.fade(_SEQUENCE_MEMORY)
        for place in range(min(num_accepted + 1, num_drafted)):
            ratio.expected += self._acceptance[place]
            ratio.accepted += place < num_accepted
            self._acceptance.observe(place, place < num_accepted)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._ratios.pop(request_id, None)

    def _chances(self, ratio: float, limit: int) -> list[float]:
        """Chance that the sequence's first, second, ... draft is accepted together with all before it."""
        chance, chances = 1.0, []
        for place in range(limit):
            chance *= min(self._acceptance[place] * ratio, _MAX_ACCEPTANCE)
            chances.append(chance)
        return chances

    def _probe(self, lengths: list[int], limits: Sequence[int]) -> None:
        if self._idle_steps % _PROBE_INTERVAL >= _PROBE_STEPS or self._idle_steps < _PROBE_INTERVAL:
            return
        best_case = [[_MAX_ACCEPTANCE ** (place + 1) for place in range(limit)] for limit in limits]
        if any(best_lengths(self._costs, best_case)):
            chosen = max(range(len(limits)), key=lambda index: limits[index])
            lengths[chosen] = min(limits[chosen], _PROBE_TOKENS)


def best_lengths(costs: StepCosts, chances: Sequence[Sequence[float]]) -> list[int]:
    """Draft lengths that maximise expected tokens / seconds of one step.

    Args:
        costs: of the step's parts.
        chances: for each sequence, by place: the chance that drafts up to there are all accepted; falling.

    Returns:
        One length a sequence; all 0 unless drafting gains at least ``_MIN_GAIN``.
    """
    num_sequences = len(chances)
    by_chance = sorted(
        ((chance, place, index) for index, row in enumerate(chances) for place, chance in enumerate(row)),
        key=lambda candidate: (-candidate[0], candidate[1]),
    )
    drafting = [0] * max((len(row) for row in chances), default=0)  # sequences that draft at each place
    expected, draft_seconds = float(num_sequences), 0.0
    best_rate, best_count = _MIN_GAIN * expected / costs.verify(num_sequences), 0
    for count, (chance, place, _) in enumerate(by_chance, start=1):
        curve = costs.next_draft if place else costs.first_draft
        before = curve(drafting[place]) if drafting[place] else 0.0
        drafting[place] += 1
        draft_seconds += curve(drafting[place]) - before
        expected += chance
        rate = expected / (costs.verify(num_sequences + count) + draft_seconds)
        if rate > best_rate:
            best_rate, best_count = rate, count
    lengths = [0] * num_sequences
    for _, place, index in by_chance[:best_count]:
        lengths[index] = max(lengths[index], place + 1)
    return lengths
