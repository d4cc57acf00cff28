"""The worker's process, as the machine sees it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_libc = ctypes.CDLL(None)
_GREATEST_NICENESS = 19
_KERNELS = 64
"""How many compiled kernels a library keeps. With the default of 1,024 the worker takes 300 MB more after 112 updates
of Qwen2.5-Coder-0.5B's draft, and is no faster."""


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
