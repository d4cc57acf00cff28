"""Cores that several replicas share."""

from __future__ import annotations

from collections.abc import Hashable


class Machine:
    """Tasks of one thread each, which have equal shares of the cores where there are too few."""

    def __init__(self, cores: float) -> None:
        self._cores = cores
        self._left: dict[tuple[Hashable, bool], float] = {}
        """Seconds of a core that each task still needs, and whether it is of an engine."""
        self._now = 0.0
        self.busy = {True: 0.0, False: 0.0}
        """Seconds of a core that engines took, and others."""

    def start(self, now: float, task: Hashable, seconds: float, is_engine: bool) -> None:
        """A task begins, which is not there yet."""
        self._advance(now)
        self._left[task, is_engine] = seconds

    def next_end(self) -> tuple[float, Hashable, bool] | None:
        """When which task ends if none begins before that, and whether it is of an engine."""
        if not self._left:
            return None
        task, is_engine = first = min(self._left, key=self._left.__getitem__)
        return self._now + self._left[first] / self._rate(), task, is_engine

    def end(self, now: float, task: Hashable, is_engine: bool) -> None:
        """A task ends, as ``next_end`` said."""
        self._advance(now)
        del self._left[task, is_engine]

    def _rate(self) -> float:
        return min(1.0, self._cores / len(self._left))

    def _advance(self, now: float) -> None:
        passed, self._now = now - self._now, now
        for task, left in self._left.items():
            done = passed * self._rate()
            self._left[task] = max(left - done, 0.0)
            self.busy[task[1]] += done
