"""Import direction: server, adapters -> engine -> kernels; and the server's processes load no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "adapters": {"adapters", "engine", "kernels"},
    "server": {"server", "engine"},
}
HEAVY = ["torch", "transformers", "xgrammar", "opentelemetry.exporter"]


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_they_stand_on(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = set(imported_packages(path)) & set(ALLOWED) - ALLOWED[package]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


@pytest.mark.parametrize("module", ["server.app", "server.cli"])
def test_server_loads_no_torch(module: str) -> None:
    script = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
