"""What an image is built from, and what an installed package holds. deploy/image/check.sh runs a built image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from evospec.kernels.targets import PLAIN, SOURCES, TARGETS, sources_hash

ROOT = Path(__file__).parents[2]


def test_the_package_holds_the_compiled_kernels() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["evospec.kernels"]
    assert all(any(fnmatch(target.library.name, pattern) for pattern in patterns) for target in TARGETS)


def test_the_package_holds_the_sources_that_the_kernels_must_be_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["evospec.kernels"]
    packaged = {path for pattern in patterns for path in SOURCES.parent.glob(pattern)}
    assert {path for path in SOURCES.rglob("*") if path.is_file()} <= packaged


@pytest.mark.parametrize("made_of", [sources_hash(), "other sources"], ids=["these", "other"])
def test_an_image_needs_libraries_of_its_sources_whatever_their_age(tmp_path: Path, made_of: str) -> None:
    """pip unpacks the libraries before the rules that made them, which then look newer."""
    installed = shutil.copytree(
        ROOT / "kernels", tmp_path / "evospec" / "kernels", ignore=shutil.ignore_patterns("*.so")
    )
    for target in (*TARGETS, PLAIN):
        library = installed / target.library.name
        library.write_text(f"a library of {made_of}")
        os.utime(library, (0, 0))
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    [check] = re.findall(r'python -c "(from evospec.kernels[^"]*)"', dockerfile)
    finished = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env={}, stderr=subprocess.PIPE, text=True)
    assert ("AssertionError" in finished.stderr) == (finished.returncode != 0) == (made_of != sources_hash())


def test_the_build_context_has_what_the_dockerfile_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    sources = {source for words in copies if "--from" not in words[1] for source in words[1:-1]}
    assert "drafts" in sources
    assert sources <= kept
