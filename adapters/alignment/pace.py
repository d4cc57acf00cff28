"""How much of the machine training may take while the engine wants it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from engine.adapters_config import PaceConfig

_STAT = Path("/proc/stat")
_MIN_INTERVAL = 0.25


SpareCores = Callable[[], float | None]
"""Cores idle of late, those that this process uses itself included; None: unknown."""


class CpuMonitor:
    """Spare cores by /proc/stat, among those that this process may run on, since the last call.

    It needs no kernel option, unlike /proc/pressure, and does not take the worker's own waiting for the engine's. In a
    container that is limited by a quota it sees the host's cores: set ``pace.spare_cores`` accordingly, or pin it.
    """

    def __init__(self) -> None:
        self._last = self._read()

    def __call__(self) -> float | None:
        now = self._read()
        if now is None or self._last is None:
            return None
        seconds, idle, own = (new - old for new, old in zip(now, self._last, strict=True))
        if seconds < _MIN_INTERVAL:
            return None
        self._last = now
        return (idle + own) / seconds

    def _read(self) -> tuple[float, float, float] | None:
        """Time, idle seconds of our cores together, seconds of this process."""
        try:
            lines = _STAT.read_text().splitlines()
        except OSError:
            return None
        allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = [line.split() for line in lines if line.split(" ", 1)[0] in allowed]
        idle = sum(int(fields[4]) + int(fields[5]) for fields in ticks) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), idle, time.process_time()


_READ_SECONDS, _READ_SHARE = 10.0, 0.01
"""From one look at the log to the next, at least, while the machine is wanted; and how much of a core looks take."""
_PATIENCE = 300.0
"""Seconds without an idle moment after which training takes its share of a busy machine."""
_OTHERS = 0.25
"""Cores that others use, at most, while the machine counts as idle."""


class Pacer:
    """Says when the next update may start, and when to take in what was logged.

    At once where ``spare_cores`` are idle. Where the machine is wanted, or that cannot be known, only if it was not
    idle for minutes, and after an update of s seconds not before s / ``busy_share`` seconds: training never takes more
    than that share of one core from the engine, and is niced as well. What was logged waits for some seconds then, and
    for longer where to take it in takes long.
    """

    def __init__(
        self, config: PaceConfig, spare_cores: SpareCores | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._clock = config, clock
        self._spare_cores = spare_cores or CpuMonitor()
        num_cores = len(os.sched_getaffinity(0))
        self._wanted_spare = num_cores - _OTHERS if config.spare_cores is None else config.spare_cores
        self._spare: float | None = None
        self._next_when_busy = clock() + _PATIENCE
        self._next_reading = clock()

    def may_run(self) -> bool:
        """Whether an update may start now."""
        return self.is_idle() or (self._config.busy_share > 0 and self._clock() >= self._next_when_busy)

    def may_read(self) -> bool:
        """Whether to take in now what was logged."""
        return self.is_idle() or self._clock() >= self._next_reading

    def took_in(self, seconds: float) -> None:
        """To take in what was logged took the worker so long."""
        self._next_reading = self._clock() + max(_READ_SECONDS, seconds / _READ_SHARE)

    def ran(self, seconds: float) -> None:
        """The worker computed for so long."""
        if self._config.busy_share:
            rest = seconds * (1 / self._config.busy_share - 1)
            self._next_when_busy = max(self._next_when_busy, self._clock() + rest)

    def is_idle(self) -> bool:
        """Whether nobody else wants the machine, as far as is known."""
        spare = self._spare_cores()
        if spare is not None:
            self._spare = spare
        is_idle = self._spare is not None and self._spare >= self._wanted_spare
        if is_idle:
            self._next_when_busy = self._clock() + _PATIENCE
        return is_idle
