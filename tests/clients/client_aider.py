# requires: aider-chat
"""aider: it asks for a change of a file, whole, and writes what comes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = ("--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings")


def main(base_url: str, model: str) -> None:
    """Have a function added to a file."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "sums.py"
        file.write_text("def add(a, b):\n    return a + b\n")
        message = ("--message", "Add a function subtract(a, b) below add.")
        server = ("--model", f"openai/{model}", "--openai-api-base", base_url, "--openai-api-key", "none")
        aider = Path(sys.executable).with_name("aider")
        done = subprocess.run(
            [aider, *server, *OPTIONS, "--edit-format", "whole", *message, file.name],
            cwd=directory,
            capture_output=True,
            text=True,
        )
        assert "def subtract" in file.read_text(), f"{done.stdout[-500:]} {done.stderr[-500:]}"
    print("chat stream\nchat edit")


if __name__ == "__main__":
    main(*sys.argv[1:])
