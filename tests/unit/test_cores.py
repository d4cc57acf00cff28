"""Cores by quota of control groups, laid out as the kernel has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evospec.engine.machine import available_cores, cpu_quota


def layout(root: Path, own: str, **limits: str) -> tuple[Path, Path]:
    """Control groups with a cpu.max each (``a__b`` is a/b, ``top`` the topmost), and the file that names the own."""
    groups = root / "cgroup"
    for name, limit in limits.items():
        directory = groups if name == "top" else groups / name.replace("__", "/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cpu.max").write_text(limit + "\n")
    own_group = root / "own"
    own_group.write_text(f"0::{own}\n")
    return groups, own_group


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("/a/b", {"a": "max 100000", "a__b": "150000 100000"}, 1.5),
        ("/a/b", {"a": "100000 100000", "a__b": "150000 100000"}, 1.0),
        ("/a/b", {"a": "max 100000", "a__b": "max 100000"}, None),
        ("/", {"top": "50000 100000"}, 0.5),
        ("/docker/1234", {"top": "200000 100000"}, 2.0),  # in a container that sees the host's names
        ("/a/b", {"other": "100000 100000"}, None),
    ],
)
def test_the_smallest_quota_on_the_way_up_counts(
    tmp_path: Path, own: str, limits: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(*layout(tmp_path, own, **limits)) == expected


def test_without_control_groups_nothing_is_known(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path / "neither") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 1.0), (0.5, 0.0), (0.0, 0.0)])
def test_at_least_one_core_and_no_more_than_the_process_may_run_on(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: float
) -> None:
    allowed = len(os.sched_getaffinity(0))
    monkeypatch.setattr("evospec.engine.machine.cpu_quota", lambda: None if quota is None else quota)
    assert available_cores() == max(1, int(expected * allowed))
    monkeypatch.setattr("evospec.engine.machine.cpu_quota", lambda: allowed + 0.5)
    assert available_cores() == allowed
