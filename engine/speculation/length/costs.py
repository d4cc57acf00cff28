"""What the parts of a step cost, by their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_RATE, _IDLE_RATE = 0.03, 0.002
"""Weight of a step in what drafts have taken, and how fast that is forgotten without drafts."""
_DEAREST = 4.0
"""A step's drafts count as so many times dearer than expected at most: something else had the processor."""


def without_spikes(points: Sequence[tuple[int, float]], start: int = 1) -> list[tuple[int, float]]:
    """Sizes and seconds less those, from size ``start`` on, that took longer than the line between their neighbours.

    Where a step is bound by arithmetic each further token or sequence costs as much as the one before it, or more; but
    whatever else has the processor makes single sizes look dear, and what lies behind them cheap.
    """
    kept = [point for point in points if point[0] < start]
    hull: list[tuple[int, float]] = []
    for point in points[len(kept) :]:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return kept + hull


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


class Curve:
    """Seconds by a number of tokens or sequences: linear between measured points, and past the last.

    Fewer never cost more: where it was measured so, something else had the processor then. So past the last each costs
    as much as between the last two, and no less than in the mean of all.
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
            points = list(zip(self._sizes, self._seconds, strict=True))
            slope = max(_slope(points[-2], points[-1]), _slope(points[0], points[-1]))
            table += np.maximum(sizes - self._sizes[-1], 0) * slope
        self._table = table.tolist()


Seconds = Callable[[int], float]
"""By a number of tokens or sequences."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of a step."""

    verify: Curve
    """By tokens: the target's forward pass, its choices, and what is kept of it for later drafts."""
    first_draft: Curve
    """By sequences: the first draft token of each, and what its vocabulary learns of what became of it."""
    next_draft: Curve
    """By sequences: each further draft token."""
    read: float = 0.0
    """Of a token that a sequence has before its first draft: the draft computes it, and its vocabulary learns it."""


class ServedCosts:
    """Costs as measured at start, but drafts and the rest of a step are dearer where they have been while serving.

    At start sequences are made up: they are short, have few n-grams to be looked up, and their vocabularies little to
    learn. Never cheaper: what was measured is the shortest of a few times.
    """

    def __init__(self, measured: StepCosts) -> None:
        self._measured = measured
        self._ratio = 1.0
        """What drafts took / what was measured, with fading memory."""
        self._rest = 0.0
        """Seconds that steps took more than verifying was measured to, drafts left out, with fading memory."""

    def verify(self, size: int, /) -> float:
        """All of a step but its drafts."""
        return self._measured.verify(size) + self._rest

    @property
    def read(self) -> float:
        return self._factor * self._measured.read

    def first_draft(self, size: int, /) -> float:
        return self._factor * self._measured.first_draft(size)

    def next_draft(self, size: int, /) -> float:
        return self._factor * self._measured.next_draft(size)

    def correct(self, expected: float, seconds: float) -> None:
        """What a step's drafts were to take by these costs, and what they took."""
        if expected > 0.0:
            self._learn(min(self._factor * seconds / expected, _DEAREST), _RATE)

    def correct_rest(self, size: int, seconds: float) -> None:
        """What a step without prompts took that verified so many tokens, its drafts left out."""
        measured = self._measured.verify(size)
        self._rest += (min(max(seconds - measured, 0.0), _DEAREST * measured) - self._rest) * _RATE

    def idle(self) -> None:
        """A step without drafts: what they took is forgotten, so that they are tried again."""
        self._learn(1.0, _IDLE_RATE)

    @property
    def _factor(self) -> float:
        return max(self._ratio, 1.0)

    def _learn(self, ratio: float, rate: float) -> None:
        self._ratio += (ratio - self._ratio) * rate


Costs = StepCosts | ServedCosts
