"""Makes the most of the first half hour with a GPU: ``make gpu-day``, or one call by one: ``ARGS="--only steps"``.

Each call takes under ten minutes, the most that a lent machine gives a command, and ends whatever it runs when its time
is over. All write into one report, so that a call may be made on its own, or again. NOT RUN on a GPU so far.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from evospec.engine.gpu import search_path

_PYTHON = sys.executable
_PYTEST = (_PYTHON, "-m", "pytest", "-q", "--durations=5")
_LAST_LINES = 60


def calls(emulated: bool) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Seconds and command of each call, those first without which the others are worth little."""
    emulation = ("tests.emulate",) if emulated else ()
    steps = (_PYTHON, "-m", *emulation, "benchmarks.gpu_day.steps", "--shape", "tiny" if emulated else "8b")
    names = "gumbel_triton", "thresholds_triton", "between_products_triton", "draft_head", "int4"
    kernels = [f"tests/unit/test_{name}.py" for name in names]
    return {
        "card": (60, ("nvidia-smi",)),
        "kernels": (300, (*_PYTEST, *kernels, "tests/unit/test_batched_lora.py")),
        "attention": (580, (*_PYTEST, "-m", "gpu", "tests/integration")),
        "memcheck": (580, ("compute-sanitizer", "--error-exitcode", "1", *_PYTEST, kernels[1])),
        "exactness": (300, (*steps, "--check")),
        "steps": (580, steps),
        "roof": (200, (*steps, "--roof")),
        "ipc": (120, (*_PYTEST, "tests/unit/test_weight_channel.py")),
    }


def main(
    report: Annotated[Path, typer.Option(help="File that results are appended to.")] = Path("gpu-day.md"),
    only: Annotated[list[str] | None, typer.Option(help="Calls to make; default: all.")] = None,
    emulated: Annotated[bool, typer.Option(help="Without a GPU, as far as that goes.")] = False,
) -> None:
    of_all = calls(emulated)
    failed = []
    for name in only or of_all:
        seconds, command = of_all[name]
        started = time.monotonic()
        outcome, output = _run(command, seconds)
        took = time.monotonic() - started
        text = "\n".join(output.splitlines()[-_LAST_LINES:])
        with report.open("a") as file:
            file.write(f"## {name}: {outcome}, {took:.0f} s\n\n`{' '.join(command)}`\n\n```\n{text}\n```\n\n")
        print(f"{name}: {outcome}, {took:.0f} s", flush=True)
        if outcome != "done":
            failed.append(name)
    raise SystemExit(bool(failed))


def _run(command: tuple[str, ...], seconds: int) -> tuple[str, str]:
    """How it ended, and what it printed."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": search_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError as error:
        return "not there", str(error)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return "out of time", output.decode() if isinstance(output, bytes) else output
    return ("done" if done.returncode == 0 else f"failed with {done.returncode}"), done.stdout


if __name__ == "__main__":
    typer.run(main)
