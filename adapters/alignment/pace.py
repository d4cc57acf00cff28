"""How much of the machine the worker takes: when it computes, at which priority, and in how much memory."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from evospec.engine.adapters_config import PaceConfig

_STAT = Path("/proc/stat")
_MIN_INTERVAL = 0.25
_READ_SECONDS, _READ_SHARE = 10.0, 0.01
"""From one look at the log to the next, at least, while the machine is wanted; and how much of a core looks take."""
_PATIENCE = 300.0
"""Seconds without an idle moment after which training takes its share of a busy machine."""
_OTHERS = 0.25
"""Cores that others use, at most, while the machine counts as idle."""
_GREATEST_NICENESS = 19
_KERNELS = 64
"""How many compiled kernels a library keeps. With the default of 1,024 the worker takes 300 MB more after 112 updates
of Qwen2.5-Coder-0.5B's draft, and is no faster."""
_libc = ctypes.CDLL(None)

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


def yield_to_others(niceness: int) -> None:
    """Let every other process go first.

    A session of its own is a group of its own to Linux's autogroups, within which alone niceness counts; so the group
    is niced as well. At the greatest niceness Linux takes the core away as soon as anybody else wants one, where else
    it would wait for a turn to end. On Linux all this is of single threads; those started later have it from this one.
    """
    if sys.platform != "linux":
        os.nice(niceness)
        return
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
            if niceness == _GREATEST_NICENESS:
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def bound_memory() -> None:
    """Let oneDNN, and PyTorch's layer on it, keep few of the kernels that are compiled for each shape of a product.

    To be called before the first product.
    """
    for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(capacity, str(_KERNELS))


def give_back_memory() -> None:
    """Return to the system what the allocator keeps for later: the next update may be hours away."""
    if sys.platform == "linux" and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process; 0 where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
