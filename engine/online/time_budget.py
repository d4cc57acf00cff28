"""A share of the time, for something that must not cost more."""

from __future__ import annotations


class TimeBudget:
    """Seconds that are earned by others' work, saved up, and spent; a spender may run into debt once.

    Args:
        share: of the seconds worked, earned.
        most: seconds that can be saved, as many as there are at first.
    """

    def __init__(self, share: float, most: float) -> None:
        self._share, self._most = share, most
        self._saved = most

    def is_left(self) -> bool:
        """Whether there is something to spend."""
        return self._saved > 0

    def earn(self, seconds: float) -> None:
        """So much was worked, what was spent included."""
        self._saved = min(self._most, self._saved + self._share * seconds)

    def spend(self, seconds: float) -> None:
        """Take away what something has cost."""
        self._saved -= seconds
