"""Free memory by the machine and by control groups, laid out as the kernel has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evospec.engine.machine import free_memory

KIB, MIB = 1024, 1024**2


def write_group(directory: Path, limit: str, used: int, inactive_file: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\nactive_file 7\n")


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path, Path]:
    """With 1,000 MiB available, and a process in the group /a/b."""
    meminfo, own_group = tmp_path / "meminfo", tmp_path / "own"
    meminfo.write_text(f"MemTotal: 4096000 kB\nMemFree: 7 kB\nMemAvailable:   {1000 * MIB // KIB} kB\n")
    own_group.write_text("0::/a/b\n")
    return meminfo, tmp_path / "cgroup", own_group


def test_without_limits_it_is_what_the_machine_has(machine: tuple[Path, Path, Path]) -> None:
    assert free_memory(*machine) == 1000 * MIB
    write_group(machine[1] / "a", "max", 900 * MIB, 0)
    assert free_memory(*machine) == 1000 * MIB


@pytest.mark.parametrize(("used", "cache", "expected"), [(100, 0, 400), (450, 50, 100), (600, 0, 0), (0, 0, 500)])
def test_the_tightest_limit_on_the_way_up_counts(
    machine: tuple[Path, Path, Path], used: int, cache: int, expected: int
) -> None:
    write_group(machine[1] / "a", str(500 * MIB), used * MIB, cache * MIB)
    write_group(machine[1] / "a/b", str(2000 * MIB), used * MIB, cache * MIB)
    assert free_memory(*machine) == expected * MIB


def test_a_machine_with_less_than_the_limit(machine: tuple[Path, Path, Path]) -> None:
    write_group(machine[1] / "a/b", str(2000 * MIB), 0, 0)
    assert free_memory(*machine) == 1000 * MIB


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert free_memory(tmp_path / "none", tmp_path, tmp_path / "neither") is None
