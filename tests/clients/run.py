"""Clients that other people wrote, each in an environment of its own: what of each works with this server?

    python -m tests.clients.run DIRECTORY [CLIENT ...]  # the environments are in DIRECTORY, and are used again

A client is a file ``client_*``, in Python or JavaScript. Its first line says what to install. It takes the server's
URL and the model, and prints a line for each thing that works: which API the client uses, and the feature.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.running_server import AT_ONCE, RunningServer

MODEL = "qwen2.5-coder-0.5b"
FEATURES = ("answer", "stream", "call", "call-stream", "result", "schema", "edit")
"""Columns of the table: an answer, whole and streamed; a call of a tool, whole and streamed; an answer to its result;
an answer that follows a schema; a file that the client has written."""
_SECONDS = 600
_LONGEST = 32_768
"""Tokens of a prompt and its answer: agents describe their tools at length."""


def command_of(script: Path, directory: Path) -> list[Path | str]:
    """What runs a client in its environment, which is made if it is not there."""
    home = directory / script.stem
    required = script.read_text().splitlines()[0].partition("requires: ")[2].split()
    python = home / "bin" / "python"
    if script.suffix == ".mjs":
        if not (home / "node_modules").exists():
            subprocess.run(["npm", "install", "--silent", "--prefix", home, *required], check=True)
    elif not python.exists():
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *required], check=True)
    interpreter: Path | str = "node" if script.suffix == ".mjs" else python
    return [interpreter, shutil.copy(script, home)]  # JavaScript finds packages beside the script only


def run(command: Sequence[Path | str], url: str) -> tuple[dict[str, list[str]], str]:
    """The features that work, by API; and the last line of what the client wrote if it failed."""
    environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    command = ["timeout", str(_SECONDS), *command, f"{url}/v1", MODEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    working: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        api, _, feature = line.partition(" ")
        if feature in FEATURES:
            working.setdefault(api, []).append(feature)
    return working, "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1]


def main(directory: Path, names: Sequence[str]) -> None:
    """Run the clients, one after the other, and print a table; exit with 1 if one fails."""
    scripts = [path for path in sorted(Path(__file__).parent.glob("client_*.*")) if not names or path.stem in names]
    commands = {script.stem.removeprefix("client_"): command_of(script, directory) for script in scripts}
    options = ["--max-model-len", str(_LONGEST), "--log.format", "json"]
    server = RunningServer(directory / "server.jsonl", [MODEL, *AT_ONCE, *options])
    failures: dict[str, str] = {}
    print("| client | API |", " | ".join(FEATURES), "|\n|---|---|" + "---|" * len(FEATURES))
    try:
        server.wait_until_healthy()
        for name, command in commands.items():
            working, failure = run(command, server.base_url)
            for api, features in working.items():
                marks = ["works" if feature in features else "" for feature in FEATURES]
                print(f"| {name} | {api} |", " | ".join(marks), "|", flush=True)
            if failure:
                failures[name] = failure
    finally:
        server.stop()
    for name, failure in failures.items():
        print(f"{name} fails: {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
