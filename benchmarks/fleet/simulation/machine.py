"""Cores that several replicas share."""

from __future__ import annotations

from collections.abc import Hashable


class Machine:
    """Tasks of one thread each. Short ones come first, as with Linux those that slept; the others share the rest."""

    def __init__(self, cores: float) -> None:
        self._cores = cores
        self._left: dict[bool, dict[Hashable, float]] = {True: {}, False: {}}
        """Seconds of a core that tasks still need; the short ones under True."""
        self._now = 0.0
        self.busy = {True: 0.0, False: 0.0}
        """Seconds of a core that short tasks took, and others."""

    def start(self, now: float, task: Hashable, seconds: float, is_short: bool) -> None:
        """A task begins, which is not there yet."""
        self._advance(now)
        self._left[is_short][task] = seconds

    def next_end(self) -> tuple[float, Hashable, bool] | None:
        """When which task ends if none begins before that, and whether it is a short one."""
        ends = [
            (self._now + left / rate, task, is_short)
            for is_short, rate in self._rates().items()
            for task, left in self._left[is_short].items()
            if rate > 0.0
        ]
        return min(ends, key=lambda end: end[0], default=None)

    def end(self, now: float, task: Hashable, is_short: bool) -> None:
        """A task ends, as ``next_end`` said."""
        self._advance(now)
        del self._left[is_short][task]

    def _rates(self) -> dict[bool, float]:
        """Of a core, for each task."""
        num_short, num_long = len(self._left[True]), len(self._left[False])
        short = min(1.0, self._cores / max(num_short, 1))
        return {True: short, False: min(1.0, (self._cores - short * num_short) / max(num_long, 1))}

    def _advance(self, now: float) -> None:
        passed, self._now = now - self._now, now
        for is_short, rate in self._rates().items():
            tasks = self._left[is_short]
            self.busy[is_short] += passed * rate * len(tasks)
            for task in tasks:
                tasks[task] = max(tasks[task] - passed * rate, 0.0)
