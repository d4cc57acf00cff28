"""How many cores this process may keep busy."""

from __future__ import annotations

import math
import os
from pathlib import Path

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Those that it may run on, or fewer where its control group has a quota (``docker run --cpus``): at least one.

    More threads than the quota has cores would use it up, and then all stand still until the next period.
    """
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))


def cpu_quota(groups: Path = _GROUPS, own_group: Path = _OWN_GROUP) -> float | None:
    """Cores' worth of time that the process's control group, or one above it, may use; None: no limit is known.

    Args:
        groups: where control groups (version 2) are mounted.
        own_group: the file that names the process's own.
    """
    quotas = []
    directory = groups / _own_path(own_group)
    while directory.is_relative_to(groups):  # in a container the own group may be mounted as the topmost
        try:
            quota, period = (directory / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
        directory = directory.parent
    return min(quotas, default=None)


def _own_path(own_group: Path) -> str:
    try:
        lines = own_group.read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), "")
