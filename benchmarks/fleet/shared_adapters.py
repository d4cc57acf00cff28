"""After how many seconds others draft with what one server has learned: ``python -m benchmarks.fleet.shared_adapters``.

Two servers of one Valkey. A tenant's prompts go to the first, in bursts; both are asked for a few tokens again and
again, and each answer tells which version of the adapter drafted. A third server is started when there are some. At the
end all answer held-out prompts.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.environment import environment
from benchmarks.common.learning_server import LearningServer, serving, verification_length
from benchmarks.common.machine import write_record
from benchmarks.common.process import LOGS
from benchmarks.fleet.processes import running_valkey
from benchmarks.prompts.sets import DATA, read_prompts

MODEL = "smollm2-135m"
BAR = 10.0
"""Seconds within which an adapter is to be in force everywhere."""
_OPTIONS = [
    *("--engine.runtime.threads", "1"),
    *("--kv-max-bytes", str(256 * 1024**2)),
    "--no-engine.speculation.adaptive",
]
_EAGER = [f"--engine.alignment.pace.{name}=0" for name in ("spare_cores", "first_steps", "niceness")]
"""The first server learns at once, though this machine's few cores are busy with clients and other servers."""
_BURST, _PAUSE = 16, 5.0
_LOOK_SECONDS = 0.25
_LONGEST = 1200.0
_HELD_OUT = 16
_FIRST_LOG = "adapters-first.log"


class Versions:
    """When a server was first seen with each version of the adapter, in seconds since 1970."""

    def __init__(self, server: LearningServer) -> None:
        self._server = server
        self.seen: list[float] = []

    async def watch(self) -> None:
        """Ask for a few tokens again and again, until cancelled."""
        newest = 0
        while True:
            version = (await self._server.ask("Go on.", 4))["draft_version"]
            if version > newest:  # others are of requests that keep the base draft
                newest = version
                self.seen.append(time.time())
                typer.echo(f"{self._server.url} drafts with version {version}")
            await asyncio.sleep(_LOOK_SECONDS)


def published(log: Path) -> list[float]:
    """When a server's worker decided to publish each version, by its log, in seconds since 1970."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return [datetime.fromisoformat(line["timestamp"]).timestamp() for line in lines if line.get("verdict") == "publish"]


async def teach(server: LearningServer, prompts: Sequence[str]) -> None:
    """A tenant's bursts, until cancelled."""
    waiting = cycle(prompts)
    while True:
        await asyncio.gather(*(server.ask(prompt, 128) for prompt in islice(waiting, _BURST)))
        await asyncio.sleep(_PAUSE)


async def acceptance(server: LearningServer, prompts: Sequence[str]) -> float:
    return verification_length([await server.ask(prompt, 64) for prompt in prompts])


async def measure(versions: int) -> dict[str, Any]:
    """Seconds from the first server's versions to the second's, from the third's start to its first; acceptance.

    A version is there with the first answer that was drafted with it.
    """
    stream, held_out = (read_prompts([DATA / f"law-{name}.jsonl"]) for name in ("stream", "trial"))
    held_out = held_out[:_HELD_OUT]
    async with AsyncExitStack() as stack:
        _, redis_url, directory = await stack.enter_async_context(running_valkey())

        def start(name: str, *more: str) -> LearningServer:
            own = ["--redis.url", redis_url, "--engine.alignment.state_directory", str(directory / name)]
            options = [*_OPTIONS, *own, *more]
            return stack.enter_context(serving(MODEL, MODEL, f"adapters-{name}", options))

        first, second = start("first", *_EAGER), start("second")
        before = await acceptance(second, held_out)
        other = Versions(second)
        teaching = [asyncio.create_task(work) for work in (teach(first, stream), other.watch())]
        async with asyncio.timeout(_LONGEST):
            while len(other.seen) < versions:
                for task in teaching:
                    if task.done():
                        task.result()  # raises what ended it
                await asyncio.sleep(_LOOK_SECONDS)
            for task in teaching:
                task.cancel()
            await asyncio.gather(*teaching, return_exceptions=True)
            third = start("third")
            started, newcomer = time.time(), Versions(third)
            watching = asyncio.create_task(newcomer.watch())
            while not newcomer.seen:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_SECONDS)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return {
            "seconds": [there - made for made, there in zip(published(LOGS / _FIRST_LOG), other.seen, strict=False)],
            "seconds_of_a_new_server": newcomer.seen[0] - started,
            "acceptance_before": before,
            "acceptance": [await acceptance(server, held_out) for server in (first, second, third)],
        }


def main(
    versions: Annotated[int, typer.Option(min=1, help="To wait for.")] = 3,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "fleet-adapters",
) -> None:
    """Exits with 1 if a version was not in force everywhere within 10 seconds."""
    found = asyncio.run(measure(versions))
    record = {"environment": environment(), "model": MODEL, "options": _OPTIONS, **found}
    write_record(name, record)
    typer.echo(json.dumps(found, indent=1))
    raise typer.Exit(max(*found["seconds"], found["seconds_of_a_new_server"]) > BAR)


if __name__ == "__main__":
    typer.run(main)
