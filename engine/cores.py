"""How many cores this process may keep busy."""

from __future__ import annotations

import math
import os
from pathlib import Path

from engine.control_groups import GROUPS, OWN_GROUP, own_groups


def available_cores() -> int:
    """Those that it may run on, or fewer where its control group has a quota (``docker run --cpus``): at least one.

    More threads than the quota has cores would use it up, and then all stand still until the next period.
    """
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))


def cpu_quota(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> float | None:
    """Cores' worth of time that the process's control group, or one above it, may use; None: no limit is known.

    Args:
        groups: where control groups (version 2) are mounted.
        own_group: the file that names the process's own.
    """
    quotas = []
    for directory in own_groups(groups, own_group):
        try:
            quota, period = (directory / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return min(quotas, default=None)
