"""How many cores this process may keep busy, and how much main memory it may take.

Both ask the control groups (version 2) that the process is in, whose limits hold for it. The parameters say where the
system tells of them, and of its memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MEMORY, _GROUPS, _OWN_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Those that it may run on, or fewer where its control group has a quota (``docker run --cpus``): at least one.

    More threads than the quota has cores would use it up, and then all stand still until the next period.
    """
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))


def cpu_quota(groups: Path = _GROUPS, own_group: Path = _OWN_GROUP) -> float | None:
    """Cores' worth of time that its control group, or one above it, may use; None: no limit is known."""
    quotas = []
    for directory in _own_groups(groups, own_group):
        try:
            quota, period = (directory / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return min(quotas, default=None)


def free_memory(meminfo: Path = _MEMORY, groups: Path = _GROUPS, own_group: Path = _OWN_GROUP) -> int | None:
    """Bytes: what the machine has left, or less where a control group has a limit (``docker run --memory``).

    What a group has in the file cache and does not use counts as free: the kernel drops it when memory is wanted.
    None: the system does not say.
    """
    available = _field(meminfo, "MemAvailable:")
    if available is None:
        return None
    left = [available * 1024]
    for directory in _own_groups(groups, own_group):
        try:
            limit, used = (int((directory / name).read_text()) for name in ("memory.max", "memory.current"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        unused_cache = _field(directory / "memory.stat", "inactive_file") or 0
        left.append(max(0, limit - used + unused_cache))
    return min(left)


def _own_groups(groups: Path, own_group: Path) -> Iterator[Path]:
    """Directories of the process's control group and of those above it, the topmost last.

    In a container the own group may be mounted as the topmost: of the others there is no directory then.
    """
    own = next((line.removeprefix("0::").lstrip("/") for line in _lines(own_group) if line.startswith("0::")), "")
    directory = groups / own
    while directory.is_relative_to(groups):
        yield directory
        directory = directory.parent


def _field(path: Path, name: str) -> int | None:
    """The number after a name at the beginning of a line."""
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[:1] == [name]), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
