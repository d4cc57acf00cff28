"""What a request waits because the worker learns: ``python -m benchmarks.beside_learning``.

A server with default settings learns from bursts of a stream's prompts. After each burst short requests come, one at a
time, at moments in which the worker computes; then learning is stopped, and as many come while it does not.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count, cycle, islice
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.common.learning_server import LearningServer, serving
from benchmarks.common.machine import write_record
from benchmarks.hour import burst
from benchmarks.prompts.sets import DATA, read_prompts

LEARNING, STOPPED = "learning", "stopped"
_WINDOW = 0.3
"""Seconds over which it is seen whether the worker computes."""
_COMPUTES, _RESTS = 0.8, 0.05
"""Shares of a core that it then uses, at least and at most."""
_PATIENCE = 20.0


def computes(worker: psutil.Process) -> float:
    """The share of a core that a process uses in a short while from now on."""
    before, started = worker.cpu_times(), time.monotonic()
    time.sleep(_WINDOW)
    after = worker.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.monotonic() - started)


def wait_until(worker: psutil.Process, is_learning: bool) -> bool:
    """Wait for a moment in which the worker computes, or does not; whether there was one."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        share = computes(worker)
        if share >= _COMPUTES if is_learning else share <= _RESTS:
            return True
    return False


class Probes:
    """Short requests to a server that learns; each has a number, so that no prefix of it is cached.

    It learns from bursts of ``each`` requests of ``stream``, which has no end.
    """

    def __init__(self, server: LearningServer, stream: Iterator[str], each: int) -> None:
        self._server, self._stream, self._each, self._numbers = server, stream, each, count()
        self.answers: dict[str, list[dict[str, Any]]] = {LEARNING: [], STOPPED: []}

    async def start_worker(self) -> None:
        """Send bursts until something was learned."""
        while not self._server.state().get("num_updates"):
            await burst(self._server, list(islice(self._stream, self._each)), 8, 256)
            await asyncio.sleep(20)

    async def ask(self, number: int) -> None:
        """A burst, and some requests while the worker learns from it; then as many while it does not."""
        worker = psutil.Process(self._server.state()["worker"]["pid"])
        await burst(self._server, list(islice(self._stream, self._each)), 8, 256)
        for kind in (LEARNING, STOPPED):
            self._server.freeze(kind == STOPPED)
            for _ in range(number):
                if not wait_until(worker, kind == LEARNING):
                    break  # it has learned all there was
                prompt = f"{next(self._numbers)}. What does a court do with a contract that nobody has signed?"
                self.answers[kind].append(await self._server.ask(prompt, 32))
        self._server.freeze(False)


def rows(answers: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """Milliseconds to the first token and to the last, the median and the 99th percentile, by kind."""
    for kind, of_kind in answers.items():
        first = 1e3 * np.array([one["seconds"] - one["decoding"] for one in of_kind])
        whole = 1e3 * np.array([one["seconds"] for one in of_kind])
        figures = (np.percentile(times, share) for times in (first, whole) for share in (50, 99))
        yield (kind, str(len(of_kind)), *(f"{figure:.1f}" for figure in figures))


async def measure(server: LearningServer, prompts: Sequence[str], rounds: int, number: int, each: int) -> Probes:
    probes = Probes(server, cycle(prompts), each)
    await probes.start_worker()
    for _ in range(rounds):
        await probes.ask(number)
    return probes


def main(
    model: Annotated[str, typer.Option(help="With a draft of this project.")] = "qwen2.5-coder-0.5b",
    rounds: Annotated[int, typer.Option(min=1, help="Bursts after which it is measured.")] = 12,
    number: Annotated[int, typer.Option(min=1, help="Requests after a burst, of each kind.")] = 10,
    each: Annotated[int, typer.Option(min=1, help="Requests of a burst.")] = 16,
) -> None:
    """Serves, asks, writes the record and prints a table."""
    prompts = read_prompts([DATA / "law-stream.jsonl"])
    with tempfile.TemporaryDirectory(prefix="evospec-beside-") as state:
        options = ["--engine.alignment.state_directory", state]
        with serving(model, model, "beside-learning", options) as server:
            probes = asyncio.run(measure(server, prompts, rounds, number, each))
    record = {"command": sys.argv[1:], "environment": environment(), "model": model, "answers": probes.answers}
    write_record(f"beside-learning-{model}", record)
    table = Table("worker", "requests", "first token p50, ms", "p99", "32 tokens p50, ms", "p99", title=model)
    for row in rows(probes.answers):
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
