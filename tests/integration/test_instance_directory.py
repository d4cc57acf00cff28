"""What an instance keeps on disk goes with it, with real processes that are killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evospec.server.instance_directory import instance_directory
from evospec.server.settings import ConfigurationError

INSTANCE = """
from evospec.server.instance_directory import instance_directory
with instance_directory() as directory:
    (directory / "left.sock").touch()
    print(directory, flush=True)
    input()
"""
Start = Callable[[], tuple[subprocess.Popen[str], Path]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start an instance in a process of its own, which ends at the end of its input; gives its directory, too."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    started: list[subprocess.Popen[str]] = []

    def start_one() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", INSTANCE], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def test_it_is_private_and_removed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with instance_directory() as directory:
        assert directory.stat().st_mode & 0o777 == 0o700
        assert list(tmp_path.iterdir()) == [directory]
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_full_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(ConfigurationError, match="No space left on device"), instance_directory():
        pass


def test_the_next_instance_removes_what_a_killed_one_left_and_nothing_else(start: Start, tmp_path: Path) -> None:
    killed, left = start()
    _, living = start()
    somebodys = tmp_path / "evospec-somebodys"
    somebodys.mkdir()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert (left / "left.sock").exists()
    with instance_directory() as own:
        assert sorted(tmp_path.iterdir()) == sorted([living, somebodys, own])
        assert (living / "left.sock").exists()
