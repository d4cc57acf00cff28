"""How much main memory this process may still take."""

from __future__ import annotations

from pathlib import Path

from engine.control_groups import GROUPS, OWN_GROUP, own_groups

_MEMORY = Path("/proc/meminfo")


def free_memory(meminfo: Path = _MEMORY, groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int | None:
    """Bytes: what the machine has left, or less where a control group has a limit (``docker run --memory``).

    What a group has in the file cache and does not use counts as free: the kernel drops it when memory is wanted.

    Args:
        meminfo: of the machine.
        groups: where control groups (version 2) are mounted.
        own_group: the file that names the process's own.

    Returns:
        None: the system does not say.
    """
    available = _field(meminfo, "MemAvailable:")
    if available is None:
        return None
    left = [available * 1024]
    for directory in own_groups(groups, own_group):
        try:
            limit, used = (int((directory / name).read_text()) for name in ("memory.max", "memory.current"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        unused_cache = _field(directory / "memory.stat", "inactive_file") or 0
        left.append(max(0, limit - used + unused_cache))
    return min(left)


def _field(path: Path, name: str) -> int | None:
    """The number after a name at the beginning of a line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
