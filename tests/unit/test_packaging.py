"""What an image is built from, and what an installed package holds: not built here, where there is no Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from kernels.targets import TARGETS, sources_hash
from server.options import HttpConfig

ROOT = Path(__file__).parents[2]


def test_the_package_holds_the_compiled_kernels() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["kernels"]
    assert all(any(fnmatch(target.library.name, pattern) for pattern in patterns) for target in TARGETS)


@pytest.mark.parametrize("made_of", [sources_hash(), "other sources"], ids=["these", "other"])
def test_an_image_needs_libraries_of_its_sources_whatever_their_age(tmp_path: Path, made_of: str) -> None:
    """pip unpacks the libraries before the rules that made them, which then look newer."""
    installed = shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so"))
    for target in TARGETS:
        library = installed / target.library.name
        library.write_text(f"a library of {made_of}")
        os.utime(library, (0, 0))
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    [check] = re.findall(r'python -c "(from kernels[^"]*)"', dockerfile)
    finished = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env={}, stderr=subprocess.PIPE, text=True)
    assert ("AssertionError" in finished.stderr) == (finished.returncode != 0) == (made_of != sources_hash())


def test_the_build_context_has_what_the_dockerfile_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    sources = {source for words in copies if "--from" not in words[1] for source in words[1:-1]}
    assert "drafts" in sources
    assert sources <= kept


def test_pods_have_time_to_finish_and_are_looked_after() -> None:
    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "evospec.yaml").read_text())
    pod = next(each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment")
    api, engine = pod["containers"][0], next(c for c in pod["initContainers"] if c["name"] == "engine")
    pause = int(api["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > HttpConfig().drain_timeout + pause
    assert _probed(engine) == ["livenessProbe"]  # a startupProbe would wait for the API server, which waits for it
    assert _probed(api) == ["livenessProbe", "readinessProbe", "startupProbe"]


def _probed(container: dict[str, Any]) -> list[str]:
    return sorted(name for name in container if name.endswith("Probe"))
