"""A directory of shared memory belongs to one engine at a time."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from evospec.engine.online.shared_file import SharedFile, SharedMemoryError, claim_directory


def test_a_directory_is_one_engines_until_it_ends(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "shared"
    claim = claim_directory(directory)
    assert directory.stat().st_mode & 0o077 == 0
    with pytest.raises(SharedMemoryError, match="another engine uses"):
        claim_directory(directory)
    os.close(claim)  # as the kernel does when a process ends
    os.close(claim_directory(directory))


def test_a_file_is_for_its_user_alone(tmp_path: Path) -> None:
    SharedFile.create(tmp_path / "file", 64).install()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SharedMemoryError, match="cannot use"):
        claim_directory(tmp_path / "file")
