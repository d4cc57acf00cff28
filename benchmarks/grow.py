"""A model without a draft grows one from its traffic: when it pays, what it gains. ``python -m benchmarks.grow``.

A model for which no draft was ever trained is served with alignment and without: by default a fine-tune of
SmolLM2-135M, its norms perturbed at random. Clients ask the prompts of a stream, one after the other, with pauses; then
held-out prompts are answered one at a time by the grown draft, by copies alone, without speculation, and by the draft
that is shipped for a model of the same shape, if there is one. Another run with the same ``--state`` goes on from where
the last one was, as a restarted server does.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import typer
import uvloop
from matplotlib.figure import Figure

from benchmarks.common.bootstrap import interval
from benchmarks.common.environment import environment
from benchmarks.common.learning_server import LearningServer, serving, verification_length
from benchmarks.common.machine import RESULTS
from benchmarks.prompts.sets import read_prompts
from evospec.engine.config import ModelConfig
from evospec.engine.models.registry import resolve_model
from evospec.engine.speculation.draft_files import shipped_draft

_MODEL = "smollm2-perturbed"
_NOISE = 0.03
_STATE_SECONDS = 5.0
_COUNTS = ("prompt_tokens", "tokens", "accepted")
GROWN, COPIES, NONE, OF_SHAPE = "grown", "copies", "none", "of its shape"
Side = tuple[str, LearningServer, bool]
"""Its name, who answers, and whether that drafts."""
_EACH_READS = ["--no-engine.cache.prefix_caching"]
"""One server answers for two sides: with its cache one of them would read no prompt."""
_METHOD = ["--engine.speculation.method"]


def perturbed_model(directory: Path) -> Path:
    """SmolLM2-135M with each norm's weights changed by 3 % of themselves at random, the same ones always."""
    path = directory / f"{_MODEL}.gguf"
    if not path.exists():
        shutil.copy(resolve_model(ModelConfig(name="smollm2-135m")).path, path)
        generator = np.random.default_rng(0)
        for tensor in gguf.GGUFReader(path, "r+").tensors:
            if tensor.name.endswith("norm.weight"):
                tensor.data[:] *= 1 + _NOISE * generator.standard_normal(tensor.data.shape, dtype=np.float32)
    return path


async def follow(
    server: LearningServer,
    prompts: Sequence[str],
    minutes: float,
    clients: int,
    pause: float,
    tokens: int,
    record: dict[str, Any],
) -> None:
    """The stream: each client asks, reads, pauses for ``pause`` times as long, and asks again."""
    started, before, told = time.monotonic(), dict(record["seen"]), 0.0
    waiting = islice(cycle(prompts), record["asked"], None)

    async def client() -> None:
        nonlocal told
        while (at := time.monotonic() - started) < 60 * minutes:
            answer = await server.ask(next(waiting), tokens)
            record["asked"] += 1
            for name in _COUNTS:
                record["seen"][name] += answer[name]
            record["seen"]["minutes"] = before["minutes"] + at / 60
            if at - told >= _STATE_SECONDS:
                told = at
                take_state(server, record)
            await asyncio.sleep(pause * answer["seconds"])

    await asyncio.gather(*(client() for _ in range(clients)))
    take_state(server, record)


async def rest(server: LearningServer, minutes: float, record: dict[str, Any]) -> None:
    started, before = time.monotonic(), record["seen"]["minutes"]
    while (at := time.monotonic() - started) < 60 * minutes:
        record["seen"]["minutes"] = before + at / 60
        take_state(server, record)
        await asyncio.sleep(_STATE_SECONDS)


def take_state(server: LearningServer, record: dict[str, Any]) -> None:
    """Write down what the worker says of the draft, if it has scored or published since the last time."""
    state, states = server.state(), record["states"]
    if not states or any(state.get(name) != states[-1]["state"].get(name) for name in ("agreement", "num_published")):
        states.append(record["seen"] | {"state": state})


async def measure(sides: Sequence[Side], prompts: Sequence[str], tokens: int, record: dict[str, Any]) -> None:
    """Held-out prompts by each side in turn, one request at a time; the other way round every other time."""
    for number, prompt in enumerate(prompts):
        answers = {}
        for name, server, drafts in sides if number % 2 else reversed(sides):
            answers[name] = await server.ask(prompt, tokens, drafts)
        record["held_out"].append(answers)


def other_sides(served: str, name: str, stack: ExitStack) -> Iterator[Side]:
    """What the grown draft is compared with, served until ``stack`` is closed."""
    plain = stack.enter_context(serving(served, name, "grow-copies", [*_EACH_READS, *_METHOD, "ngram"]))
    yield COPIES, plain, True
    yield NONE, plain, False
    if shipped_draft(resolve_model(ModelConfig(name=served))) is not None:
        fixed = [*_EACH_READS, "--no-alignment.enabled"]
        yield OF_SHAPE, stack.enter_context(serving(served, name, "grow-of-shape", fixed)), True


def summary(held_out: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each side its ``figures``, and times those of no speculation: with the ends of 95 % bootstrap intervals."""
    sides: dict[str, dict[str, Any]] = {}
    for name in sorted(held_out[0]):
        of_side = sides[name] = dict(figures(held_out, name))
        for figure in ("tokens_per_second", "decoded_per_second"):
            of_side[f"{figure}_times_none"] = times_none(held_out, name, figure)
    same = sum(len({answers[name]["text"] for name in answers}) == 1 for answers in held_out)
    return {"prompts": len(held_out), "equal_answers": same, "sides": sides}


def times_none(held_out: Sequence[dict[str, Any]], name: str, figure: str) -> list[float]:
    """A side's figure times that of no speculation, and the ends of its interval."""
    times = interval(held_out, lambda some: figures(some, name)[figure] / figures(some, NONE)[figure])
    return [round(one, 3) for one in times]


def figures(held_out: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Of a side: tokens a second over whole requests and while it decodes, and tokens a verification."""
    of_side = [answers[name] for answers in held_out]
    tokens, seconds, decoding = (sum(one[key] for one in of_side) for key in ("tokens", "seconds", "decoding"))
    return {
        "tokens_per_second": tokens / seconds,
        "decoded_per_second": (tokens - len(held_out)) / decoding,
        "tokens_a_verification": verification_length(of_side),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """What the worker's scores promise, over the tokens of traffic, prompts included."""
    known = [one for one in record["states"] if one["state"].get("agreement") is not None]
    scored = [next(same) for _, same in groupby(known, lambda one: one["state"]["agreement"])]
    tokens = [one["prompt_tokens"] + one["tokens"] for one in scored]
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    axes.plot(tokens, [1 + one["state"]["agreement"] for one in scored], "o-", label="by the worker's held-out score")
    in_force = [seen for seen, one in zip(tokens, scored, strict=True) if one["state"]["stage"] == "serving"]
    if in_force:
        axes.axvline(in_force[0], color="grey", linestyle=":", label="first in force")
    axes.set(xlabel="tokens of traffic", ylabel="tokens a verification, without copies")
    axes.legend()
    figure.savefig(path)


def main(
    stream_files: Annotated[list[Path], typer.Option("--stream", help="Prompts to grow from; repeatable.")],
    held_out: Annotated[list[Path], typer.Option(help="Prompts to measure with; repeatable.")],
    state: Annotated[Path, typer.Option(help="Directory of model, checkpoints and record.")],
    model: Annotated[str, typer.Option(help="Name of one without a draft; default: a fine-tune of SmolLM2.")] = "",
    minutes: Annotated[float, typer.Option(help="Of the stream.")] = 20.0,
    quiet: Annotated[float, typer.Option(help="Minutes after it in which nobody asks.")] = 0.0,
    prompts: Annotated[int, typer.Option(help="Held-out prompts; 0: none.")] = 24,
    clients: Annotated[int, typer.Option()] = 4,
    pause: Annotated[float, typer.Option(help="After an answer, in times of what it took.")] = 0.5,
    max_tokens: Annotated[int, typer.Option()] = 128,
    option: Annotated[list[str] | None, typer.Option(help="Of engine.alignment, NAME[=VALUE]; repeatable.")] = None,
) -> None:
    """Serves, asks, and writes benchmarks/results/grow.json, or grow-MODEL.json, and its plot."""
    state.mkdir(parents=True, exist_ok=True)
    name, served = (model, model) if model else (_MODEL, str(perturbed_model(state)))
    path = RESULTS / (f"grow-{name}.json" if model else "grow.json")
    record: dict[str, Any] = {"asked": 0, "seen": dict.fromkeys(_COUNTS, 0) | {"minutes": 0.0}}
    record |= {"runs": [], "states": [], "held_out": []}
    if (saved := state / "record.json").exists():
        record = json.loads(saved.read_text())
    record["runs"].append({"command": sys.argv[1:], "environment": environment()})
    growing = [*_EACH_READS, *_METHOD, "grow", "--engine.alignment.state_directory", str(state / "versions")]
    for assignment in option or []:
        key, *value = assignment.split("=", 1)
        growing += [f"--engine.alignment.{key}", *value]
    with serving(served, name, "grow-grown", growing) as grown:
        uvloop.run(follow(grown, read_prompts(stream_files), minutes, clients, pause, max_tokens, record))
        uvloop.run(rest(grown, quiet, record))
        saved.write_text(json.dumps(record))
        if prompts:
            record["held_out"] = []
            grown.freeze(True)  # it is the draft that is measured, not a machine shared with its training
            with ExitStack() as stack:
                sides = [(GROWN, grown, True), *other_sides(served, name, stack)]
                uvloop.run(measure(sides, read_prompts(held_out)[:prompts], max_tokens, record))
            grown.freeze(False)
            record["summary"] = summary(record["held_out"])
            typer.echo(json.dumps(record["summary"], indent=1))
    saved.write_text(json.dumps(record))
    path.write_text(json.dumps(record))
    draw(record, path.with_suffix(".png"))
    typer.echo(f"{record['states'][-1]}\n{path}")


if __name__ == "__main__":
    typer.run(main)
