"""The control groups (version 2) that this process is in, whose limits hold for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def own_groups(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> Iterator[Path]:
    """Directories of the process's control group and of those above it, the topmost last.

    In a container the own group may be mounted as the topmost: of the others there is no directory then.

    Args:
        groups: where control groups are mounted.
        own_group: the file that names the process's own.
    """
    directory = groups / _own_path(own_group)
    while directory.is_relative_to(groups):
        yield directory
        directory = directory.parent


def _own_path(own_group: Path) -> str:
    try:
        lines = own_group.read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), "")
