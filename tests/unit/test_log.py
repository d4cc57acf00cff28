"""What the logs show of an exception: where it was, never what was in its variables."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import structlog
from evospec.engine.log import configure_logging

configure_logging("info", sys.argv[1])

def handle(prompt):
    raise ValueError("the reason")

try:
    handle("a private prompt")
except ValueError:
    structlog.get_logger("test").exception("it failed")
"""


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_process_whose_errors_go_nowhere_starts(format: str) -> None:
    """As that of a daemon that has closed its descriptors."""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(SCRIPT)} {format} 2>&-"
    subprocess.run(command, shell=True, check=True)


@pytest.mark.parametrize("format", ["json", "console"])
def test_exceptions_are_logged_without_local_variables(format: str) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT, format], capture_output=True, text=True, check=True)
    assert "it failed" in result.stderr
    assert "the reason" in result.stderr
    assert "in handle" in result.stderr
    assert "private prompt" not in result.stderr.replace('handle("a private prompt")', "")
