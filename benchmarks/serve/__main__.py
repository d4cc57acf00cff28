"""Compares the servers: sides in turn, in interleaved rounds, on one machine in one run.

``python -m benchmarks.serve`` writes a JSON file and a PNG into ``benchmarks/results`` and prints the table.
What counts is the ratio of two sides within a round, not the absolute speed of the machine of the day.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console

from benchmarks.common.machine import RESULTS, provenance
from benchmarks.common.process import NoiseMeter, running, wait_for_quiet
from benchmarks.prompts.build import Messages, read_eval
from benchmarks.prompts.sets import evaluation_files, read_sets
from benchmarks.serve.peers import SIDES, Side
from benchmarks.serve.report import plot, summary_tables
from evospec.server.bench.load import LoadOptions, LoadReport, run_load
from evospec.server.bench.stream import stream

WARMUP_TOKENS = 16
WARMUP_PROMPTS = [prompt.messages for prompt in read_eval()]
SANITY_PROMPT, SANITY_ANSWER = "1, 2, 3, 4, 5, 6, 7,", " 8, 9"


@dataclass(frozen=True)
class Plan:
    sides: list[str]
    models: list[str]
    levels: list[int]
    rounds: int
    max_tokens: int
    quiet_seconds: float

    def prompts(self, level: int) -> list[Messages]:
        """Prompts of one concurrency: the grid's sets take turns. No level has another's, which caches may hold."""
        first = sum(map(requests_of_each, self.levels[: self.levels.index(level)]))
        sets = read_sets(evaluation_files(), first + requests_of_each(level))
        return [messages for row in zip(*(of_set[first:] for of_set in sets.values()), strict=True) for messages in row]


def requests_of_each(level: int) -> int:
    """Prompts of each set at one concurrency: somewhat more at once than fit."""
    return 1 + level // 8


@dataclass(frozen=True)
class Run:
    """One measurement. ``noise`` is the share of the machine used by other processes in percent."""

    side: str
    model: str
    concurrency: int
    round: int
    tokens_per_second: float
    noise: float
    sanity: str
    report: LoadReport | None


def measure(side: Side, model: str, levels: list[int], number: int, plan: Plan, console: Console) -> Iterator[Run]:
    """Starts the server once, checks that it talks sense, and measures it at ``levels`` in turn."""
    started = time.monotonic()
    log = f"{side.name}-{model}-{number}"
    with running(lambda port: side.launch(model, max(levels), port), log) as (url, server):
        console.print(f"[dim]{side.name} {model}: ready after {time.monotonic() - started:.1f} s[/dim]")
        sanity = _sanity(url, model)
        for level in levels:
            prompts = plan.prompts(level)
            options = LoadOptions(
                url=url,
                model=model,
                concurrency=level,
                num_requests=len(prompts),
                max_tokens=plan.max_tokens,
                ignore_eos=False,
                warmup_requests=level,
                warmup_tokens=WARMUP_TOKENS,
            )
            wait_for_quiet(plan.quiet_seconds)
            noise = NoiseMeter(server)
            report, _ = uvloop.run(run_load(options, prompts + WARMUP_PROMPTS))
            if report.errors:
                raise RuntimeError(f"{side.name}, {model}, concurrency {level}: {report.error_messages}")
            yield Run(side.name, model, level, number, report.tokens_per_second, noise.read(), sanity, report)


def _sanity(url: str, model: str) -> str:
    """How a count goes on; raises RuntimeError when it is wrong.

    Plain completion: after the chat template SmolLM2 has two first tokens within 0.1 nat, and what a server's
    number format makes of that says nothing about its sanity.
    """
    body = {"model": model, "prompt": SANITY_PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}
    result = uvloop.run(stream(f"{url}/v1/completions", body))
    if SANITY_ANSWER not in result.text:
        raise RuntimeError(f"{url} talks nonsense: {result.text!r} {result.error or ''}")
    return result.text


def all_runs(plan: Plan, console: Console) -> Iterator[Run]:
    """Round by round, model by model, side by side; every other round in reverse order of sides."""
    for number in range(plan.rounds):
        for model in plan.models:
            for name in plan.sides if number % 2 == 0 else reversed(plan.sides):
                side = SIDES[name]
                for group in [[level] for level in plan.levels] if side.per_concurrency else [plan.levels]:
                    yield from measure(side, model, group, number, plan, console)


def environment(plan: Plan) -> dict[str, Any]:
    servers = [SIDES[name] for name in plan.sides]
    return provenance() | {
        "versions": {side.name: side.version() for side in servers},
        "settings": {
            side.name: {
                model: {level: asdict(side.launch(model, level, 0)) for level in plan.levels} for model in plan.models
            }
            for side in servers
        },
    }


def main(
    side: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SIDES)}; default: all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Default: smollm2-135m and qwen2.5-coder-0.5b.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Default: 1, 8 and 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the ratios' spread is over them.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of an answer, at most.")] = 128,
    quiet_seconds: Annotated[
        float, typer.Option(help="Longest wait before each measurement until other processes are idle.")
    ] = 30.0,
    name: Annotated[str, typer.Option(help="Name of the files in benchmarks/results.")] = "serve",
) -> None:
    """Measures all sides and reports tok/s, latencies and EvoSpec's ratio to each peer."""
    plan = Plan(
        sides=side or list(SIDES),
        models=model or ["smollm2-135m", "qwen2.5-coder-0.5b"],
        levels=sorted(concurrency or [1, 8, 32]),
        rounds=rounds,
        max_tokens=max_tokens,
        quiet_seconds=quiet_seconds,
    )
    console = Console(width=150)
    for peer in plan.sides:
        SIDES[peer].install()
    record: dict[str, Any] = {"plan": asdict(plan), "environment": environment(plan), "runs": []}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    for result in all_runs(plan, console):
        console.print(
            f"round {result.round + 1} {result.model} {result.side} concurrency {result.concurrency}: "
            f"{result.tokens_per_second:.1f} tok/s (other processes: {result.noise:.0f} % of the machine)"
        )
        record["runs"].append(asdict(result))
        path.write_text(json.dumps(record, indent=2))
    for table in summary_tables(record):
        console.print(table)
    plot(record, path.with_suffix(".png"))
    console.print(f"{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
