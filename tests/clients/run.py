"""Clients that other people wrote, each in an environment of its own: which of them work with this server?

    python -m tests.clients.run DIRECTORY  # for the environments; what is there is used again

A client is a file ``agent_*.py``: its first line says what to install, and it takes the server's URL and the model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.running_server import SMALL, RunningServer

MODEL = "qwen2.5-coder-0.5b"
_SECONDS = 300


def environment_of(script: Path, directory: Path) -> Path:
    """The Python of a client's environment, with what the client requires."""
    python = directory / script.stem / "bin" / "python"
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
        required = script.read_text().splitlines()[0].removeprefix("# requires: ").split()
        subprocess.run([python, "-m", "pip", "install", "--quiet", *required], check=True)
    return python


def run(script: Path, python: Path, url: str) -> str:
    """ "works", or the last line of what the client wrote."""
    environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    command: list[str | Path] = [python, script, f"{url}/v1", MODEL]
    # Elsewhere: a script's own folder comes first in its path.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, cwd="/")
    return "works" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1]


def main(directory: Path) -> None:
    """Run all clients, one after the other; exit with 1 if one fails."""
    scripts = sorted(Path(__file__).parent.glob("agent_*.py"))
    pythons = [environment_of(script, directory) for script in scripts]
    server = RunningServer(directory / "server.jsonl", ["--model", MODEL, *SMALL])
    try:
        server.wait_until_healthy()
        results = {
            script.stem: run(script, python, server.base_url) for script, python in zip(scripts, pythons, strict=True)
        }
    finally:
        server.stop()
    for name, result in results.items():
        print(f"{name:24} {result}")
    sys.exit(any(result != "works" for result in results.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
