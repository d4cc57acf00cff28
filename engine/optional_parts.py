"""Parts of the engine that only make it faster: a fault in one costs speed, and ends no request. Imports no torch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import structlog

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MOST_FAULTS = 3
"""Faults of a part after which it is switched off."""
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
"""Seconds for which a part is switched off: at first, and at most. Each time in a row takes twice as long."""
_FORGIVEN = 600.0
"""Seconds of work without a fault after which earlier faults no longer count."""


@dataclass
class _Record:
    """What became of one part."""

    num_faults: int = 0
    """Since the engine started."""
    recent: int = 0
    """Those that count towards switching it off."""
    pause: float = FIRST_PAUSE
    forgiven_at: float = 0.0
    off_until: float = 0.0


class OptionalParts:
    """Calls parts that may fail, counts their faults, and switches a part off for a while that fails again and again.

    A part is switched off at its third fault, for a minute. Then it is tried again: one more fault switches it off for
    twice as long, and so on, up to an hour. Ten minutes of work without a fault make up for earlier ones.

    Args:
        clock: seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: defaultdict[str, _Record] = defaultdict(_Record)

    def call(self, part: str, otherwise: T, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``function`` returns; ``otherwise`` if it raises, and while ``part`` is switched off."""
        if self.is_off(part):
            return otherwise
        try:
            return function(*args, **kwargs)
        except Exception:
            self._count(part)
            return otherwise

    def clean_up(self, part: str, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function``, which gives back what a part holds: also of a part that is switched off."""
        try:
            function(*args, **kwargs)
        except Exception:
            self._count(part)

    def is_off(self, part: str) -> bool:
        record = self._records.get(part)
        return record is not None and self._clock() < record.off_until

    @property
    def faults(self) -> dict[str, int]:
        """How often each part has failed since the engine started; parts that never did are left out."""
        return {part: record.num_faults for part, record in self._records.items()}

    @property
    def switched_off(self) -> list[str]:
        """The parts that are switched off now, by name."""
        return sorted(part for part in self._records if self.is_off(part))

    def _count(self, part: str) -> None:
        """The exception that is being handled is a fault of ``part``."""
        now, record = self._clock(), self._records[part]
        if now > record.forgiven_at:
            record.recent, record.pause = 0, FIRST_PAUSE
        record.num_faults += 1
        record.recent += 1
        record.forgiven_at = now + _FORGIVEN
        if record.recent <= MOST_FAULTS:  # what gives back what a part holds may fail at every request
            log.exception("an optional part has failed: requests go on without it", part=part, faults=record.num_faults)
        if record.recent >= MOST_FAULTS:
            record.off_until = now + record.pause
            record.forgiven_at = record.off_until + _FORGIVEN
            log.error("an optional part is switched off", part=part, seconds=record.pause)
            record.pause = min(2 * record.pause, LONGEST_PAUSE)
