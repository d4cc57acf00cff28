"""Import direction: server, adapters -> engine -> kernels; and what processes need not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from unittest.mock import patch

import pytest

from engine.sampling.xgrammar_alone import import_xgrammar

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
    return (name.partition(".")[0] for name in imported_names(path))


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_they_stand_on(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = set(imported_packages(path)) & set(ALLOWED) - ALLOWED[package]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


@pytest.mark.parametrize("package", ALLOWED)
def test_no_other_distribution_has_a_package_of_this_name(package: str) -> None:
    """Else ``import kernels`` may find the other's, as PyPI's ``kernels``, which transformers 5.25 installs."""
    assert set(packages_distributions()[package]) == {"evospec"}


def test_no_files_import_each_other_in_a_circle() -> None:
    files = [path for package in (*ALLOWED, "benchmarks") for path in (ROOT / package).rglob("*.py")]
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    known = set(modules.values())
    graph = dict[str, set[str]]()
    for path, module in modules.items():
        names = imported_names(path)
        graph[module] = {name if name in known else name.rpartition(".")[0] for name in names} & known
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("module", "unwanted"), [("server.cli", HEAVY), ("engine.sampling.grammar_process", ["torch", "transformers"])]
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
