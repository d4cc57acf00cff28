"""A share of the time, for something that must not cost more."""

from __future__ import annotations

import time
from collections.abc import Callable


class TimeBudget:
    """Seconds that are earned as time passes, saved up, and spent; a spender may run into debt once.

    Args:
        share: of the time, earned.
        most: seconds that can be saved, as many as there are at first.
        clock: in seconds.
    """

    def __init__(self, share: float, most: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._share, self._most, self._clock = share, most, clock
        self._saved, self._earned_at = most, clock()

    def is_left(self) -> bool:
        """Whether there is something to spend."""
        self._earn()
        return self._saved > 0

    def spend(self, seconds: float) -> None:
        """Take away what something has cost."""
        self._earn()
        self._saved -= seconds

    def _earn(self) -> None:
        now = self._clock()
        self._saved = min(self._most, self._saved + self._share * (now - self._earned_at))
        self._earned_at = now
