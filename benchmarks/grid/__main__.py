"""Runs the grid, cell by cell; a cell that the record has already is left out.

In a cell every side answers the same prompts, and all sides take turns, step by step, so that a slow minute of the
machine is everybody's. Every side's answers have to be the same, to their natural ends. The prompts' own time counts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.common.environment import environment
from benchmarks.common.in_process import Engine, Turn, load_target, take_turns
from benchmarks.common.machine import RESULTS
from benchmarks.common.process import NoiseMeter
from benchmarks.grid.plan import DEFAULT, Cell, answers, cells, sides_of
from benchmarks.grid.report import read, tables
from benchmarks.grid.run import answering
from benchmarks.prompts.build import Messages
from benchmarks.prompts.sets import evaluation_files, read_sets
from benchmarks.vocabulary.hard_switch import switch_hard
from benchmarks.vocabulary.modes import Mode
from evospec.engine.messages import SamplingParams


def make_engines(sides: Mapping[str, Mode]) -> dict[str, Engine]:
    """One for each side; they share the target."""
    target = load_target(next(iter(sides.values())).config)
    engines = {name: Engine(mode.config, target) for name, mode in sides.items()}
    for name, mode in sides.items():
        if mode.switches:
            switch_hard(engines[name].core)
    return engines


def run_cell(cell: Cell, prompts: list[Messages], engines: Mapping[str, Engine], max_tokens: int) -> dict[str, object]:
    """What each side did, and the answers."""
    tokenizer = next(iter(engines.values())).tokenizer
    turns = [Turn(tokenizer.encode_messages(messages), cell.prompts) for messages in prompts]
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, temperature=cell.temperature)
    noise = NoiseMeter()
    engines = {name: engine for name, engine in engines.items() if answers(name, cell)}
    results = take_turns([answering(engine, turns, sampling, cell.load) for engine in engines.values()])
    texts = [request.token_ids for request in results[0].requests]
    for name, result in zip(engines, results, strict=True):
        assert [request.token_ids for request in result.requests] == texts, f"{name} has changed an answer"
    sides = {
        name: {"seconds": result.seconds, "parts": result.parts, "requests": [one.record() for one in result.requests]}
        for name, result in zip(engines, results, strict=True)
    }
    return asdict(cell) | {"noise": noise.read(), "texts": list(map(tokenizer.decode, texts)), "sides": sides}


def main(
    model: Annotated[str, typer.Option(help="Registry name of a model with a draft.")] = "smollm2-135m",
    draft: Annotated[str | None, typer.Option(help="Registry name of a draft model, in place of that draft.")] = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="Files; default: ../shared/data/*-eval.jsonl.")] = None,
    load: Annotated[list[int] | None, typer.Option(help="Requests at a time; default: 1, 8, 32.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Default: 0 and 0.7.")] = None,
    side: Annotated[list[str] | None, typer.Option(help="Only these, and the default.")] = None,
    count: Annotated[int, typer.Option(min=2, help="Prompts of a set.")] = 30,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 256,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "grid",
) -> None:
    """Run what the record does not have, and print all of it."""
    path = RESULTS / f"{name}-{model}.jsonl.gz"
    sets = read_sets(prompts or evaluation_files(), count)
    done = {(cell["prompts"], cell["load"], cell["temperature"]) for cell in read(path)}
    wanted = cells(list(sets), load or [1, 8, 32], temperature or [0.0, 0.7])
    left = [cell for cell in wanted if (cell.prompts, cell.load, cell.temperature) not in done]
    console = Console(width=220)
    if left:
        engines = make_engines(sides_of(model, [*side, DEFAULT] if side else [], draft))
        for number, cell in enumerate(left, start=1):
            console.print(f"{number} of {len(left)}: {cell}")
            record = run_cell(cell, sets[cell.prompts], engines, max_tokens)
            with gzip.open(path, "at") as file:
                file.write(json.dumps({"environment": environment(), "model": model} | record) + "\n")
    for table in tables(read(path)):
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
