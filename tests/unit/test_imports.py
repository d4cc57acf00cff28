"""Import direction: server, adapters -> engine -> kernels; and what processes need not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest

from evospec.engine.sampling.xgrammar_alone import import_xgrammar

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "adapters": {"adapters", "engine", "kernels"},
    "server": {"server", "engine"},
}
HEAVY = ["torch", "transformers", "xgrammar", "opentelemetry.exporter"]


def imported_names(path: Path) -> Iterator[str]:
    """Modules, or names in them, wherever the file imports them, and if only for types."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_packages(path: Path) -> Iterator[str]:
    """Those of ours, as ``engine``; a name without ``evospec.`` in front of it would be loaded a second time."""
    names = [name.split(".") for name in imported_names(path)]
    assert not [parts for parts in names if parts[0] in ALLOWED], f"{path}: evospec is missing"
    return (parts[1] for parts in names if parts[0] == "evospec")


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_they_stand_on(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = set(imported_packages(path)) & set(ALLOWED) - ALLOWED[package]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_tests_and_benchmarks_import_the_packages_by_their_full_names() -> None:
    for path in chain((ROOT / "benchmarks").rglob("*.py"), (ROOT / "tests").rglob("*.py")):
        list(imported_packages(path))


@pytest.mark.parametrize("package", ALLOWED)
def test_other_distributions_keep_their_packages_of_these_names(package: str, tmp_path: Path) -> None:
    """As PyPI's ``kernels``, which transformers asks for: also in a process that runs in the checkout."""
    theirs = tmp_path / package / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("")
    script = f"""
import sys
sys.path.insert(1, {str(tmp_path)!r})  # after the working directory
import evospec.{package}, {package}
print({package}.__file__)
"""
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == str(theirs)


def test_no_files_import_each_other_in_a_circle() -> None:
    files = [path for package in (*ALLOWED, "benchmarks") for path in (ROOT / package).rglob("*.py")]
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    modules = {path: ".".join(("evospec", *of) if of[0] in ALLOWED else of) for path, of in parts.items()}
    known = set(modules.values())
    graph = dict[str, set[str]]()
    for path, module in modules.items():
        names = imported_names(path)
        graph[module] = {name if name in known else name.rpartition(".")[0] for name in names} & known
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("evospec.server.cli", HEAVY), ("evospec.engine.sampling.grammar_process", ["torch", "transformers"])],
)
def test_processes_beside_the_engine_load_no_torch(module: str, unwanted: list[str]) -> None:
    """In ``server.cli`` is all of the server."""
    script = f"import sys, {module}; print(*(name for name in {unwanted} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("named", ["PreTrainedTokenizerBase", "New"])
def test_xgrammar_gets_transformers_only_if_it_names_more_of_it(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text("class New: ...")
    (tmp_path / "xgrammar.py").write_text(f"from transformers import {named} as given")
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(sys.modules):
        for name in ("transformers", "xgrammar"):
            sys.modules.pop(name, None)
        given = import_xgrammar().given
        assert (given.__module__ == "transformers") == ("transformers" in sys.modules) == (named == "New")
