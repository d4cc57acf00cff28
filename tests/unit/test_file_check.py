"""Sums of a model's files, checked by a process of its own beside the engine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.fetch import is_verified
from evospec.engine.models.registry import REGISTRY, known_sums
from evospec.engine.models.verify import FileCheck

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def ends_failed(verification: FileCheck) -> bool:
    """Wait until its process has ended; whether a sum was wrong."""
    deadline = time.monotonic() + 60
    while verification._process is not None and time.monotonic() < deadline:
        if verification.has_failed():
            return True
        time.sleep(0.01)
    assert verification._process is None
    return False


def hub_snapshot(cache_dir: Path) -> Path:
    """In the hub library's own layout: weights are named by their sha256, small files by a sum of another kind."""
    repository = cache_dir / "hub" / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    for name, blob in (("model.safetensors", SHA256), ("config.json", "1" * 40)):
        (blobs / blob).write_bytes(CONTENT)
        (snapshot / name).symlink_to(blobs / blob)
    return snapshot


def test_sums_are_known_of_what_was_fetched(tmp_path: Path) -> None:
    name, file = "smollm2-135m", tmp_path / "smollm2-135m.gguf"
    assert known_sums(ModelConfig(name=name), ModelFiles(name, file, "gguf")) == {file: REGISTRY[name].sha256}
    assert known_sums(ModelConfig(name=str(file)), ModelFiles(name, file, "gguf")) == {}
    snapshot = hub_snapshot(tmp_path)
    hub = ModelFiles("org/tiny", snapshot, "safetensors")
    assert known_sums(ModelConfig(name="org/tiny"), hub) == {snapshot / "model.safetensors": SHA256}
    assert known_sums(ModelConfig(name=str(snapshot)), ModelFiles("abc123", snapshot, "safetensors")) == {}


def test_files_that_are_right_stay(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    assert is_verified(path, SHA256)
    assert not ends_failed(FileCheck({path: SHA256}))
    assert len(list(tmp_path.iterdir())) == 2
    assert not FileCheck({}).has_failed()


def test_a_wrong_sum_is_told_and_the_file_is_not_trusted_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    assert is_verified(path, SHA256)
    snapshot = hub_snapshot(tmp_path)
    assert ends_failed(FileCheck({path: "0" * 64, snapshot / "model.safetensors": "0" * 64}))
    assert [entry.name for entry in tmp_path.glob("model.gguf*")] == ["model.gguf"]
    assert not (snapshot / "model.safetensors").exists()
    assert (snapshot / "config.json").exists()
    lines = capfd.readouterr().err.splitlines()
    assert [SHA256 in line and "0" * 64 in line and "critical" in line for line in lines] == [True, True]


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not ends_failed(FileCheck({tmp_path / "absent": SHA256}))
    assert "cannot be read" in capfd.readouterr().err


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """Which closes its standard input, however it ends."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # sparse: would take an hour
    command = [sys.executable, "-m", "evospec.engine.models.verify", file.name, SHA256]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 1
