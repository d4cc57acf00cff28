"""An hour of traffic in minutes, with learning and without: ``python -m benchmarks.hour``.

A server with default settings and two tenants: it learns from one, and not from the other (``learn = false``). Bursts
of a domain's stream prompts come from one and then from the other, while the worker's process is stopped; between the
bursts nothing is asked, and there is time to learn. After each domain learning is stopped for a while, and held-out
prompts are asked by both in turn, one at a time: of that domain, of those before it, and at the end of all sets.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.common.bootstrap import interval
from benchmarks.common.environment import environment
from benchmarks.common.learning_server import LearningServer, serving, verification_length
from benchmarks.common.machine import RESULTS
from benchmarks.prompts.sets import DATA, HUMANEVAL, evaluation_files, read_prompts, read_sets
from evospec.server.tenants import hash_key, new_key

LEARNING, FIXED = "learning", "fixed"
PROGRAM, BASELINE = "benchmarks.common.experiments", "benchmarks.distillation.full_parameters"
BASELINE_OPTIONS = ["key_scope=global", "log.control_share=0"]
"""It changes the draft of everybody at once."""
STATE = ("num_records", "num_updates", "num_trained_positions", "num_published", "num_refused", "agreement")
"""What is shown of an adapter."""
_TRIAL_SETS = "*-trial.jsonl"
_KEYS = '[tenants.learning]\nkeys = ["{}"]\n[tenants.fixed]\nkeys = ["{}"]\nlearn = false\n'
Answers = Mapping[str, Mapping[str, Any]]
"""What each side answered to a prompt."""


async def burst(server: LearningServer, prompts: Sequence[str], clients: int, max_tokens: int) -> dict[str, float]:
    """Ask some prompts, ``clients`` at a time; tokens, draft tokens that were right, and seconds to the last answer."""
    waiting, answers = iter(prompts), list[dict[str, Any]]()

    async def client() -> None:
        for prompt in waiting:
            answers.append(await server.ask(prompt, max_tokens))

    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    totals = {name: sum(answer[name] for answer in answers) for name in ("tokens", "accepted")}
    return totals | {"seconds": time.monotonic() - started}


async def held_out(sides: Mapping[str, LearningServer], prompts: Sequence[str], max_tokens: int) -> list[Answers]:
    """Prompts one at a time, to either side first in turn."""
    found = list[Answers]()
    for number, prompt in enumerate(prompts):
        names = [LEARNING, FIXED] if number % 2 else [FIXED, LEARNING]
        found.append({name: await sides[name].ask(prompt, max_tokens) for name in names})
    return found


@dataclass
class Hour:
    """What is asked, and what was seen so far."""

    sides: Mapping[str, LearningServer]
    """The server, as its two tenants have it."""
    sets: Mapping[str, Sequence[str]]
    """Held-out prompts by the name of their set."""
    sizes: Mapping[str, int]
    """``bursts`` of a domain, requests ``each``, ``clients``, ``pause`` between bursts (s), ``max_tokens``."""
    record: dict[str, Any]
    path: Path
    """Where the record is written after each step."""

    async def run(self, domains: Sequence[str], streams: Mapping[str, Sequence[str]]) -> None:
        """One domain after another; one that comes again goes on where it was."""
        waiting = {domain: cycle(prompts) for domain, prompts in streams.items()}
        for number, domain in enumerate(domains, 1):
            await self._stream(domain, waiting[domain])
            self.sides[LEARNING].freeze(True)
            wanted = dict.fromkeys(domains[:number]) if number < len(domains) else self.sets
            for name in filter(self.sets.get, wanted):
                answers = await held_out(self.sides, self.sets[name], self.sizes["max_tokens"])
                self._note("held_out", {"after": domain, "set": name, "answers": answers})
            self.sides[LEARNING].freeze(False)

    async def _stream(self, domain: str, waiting: Iterator[str]) -> None:
        for number in range(self.sizes["bursts"]):
            chosen = list(islice(waiting, self.sizes["each"]))
            seen: dict[str, Any] = {"domain": domain}
            for name in [LEARNING, FIXED] if number % 2 else [FIXED, LEARNING]:
                with self.sides[LEARNING].without_worker() if name == FIXED else nullcontext():
                    seen[name] = await burst(self.sides[name], chosen, self.sizes["clients"], self.sizes["max_tokens"])
            await asyncio.sleep(self.sizes["pause"])
            self._note("bursts", seen | {"state": self.sides[LEARNING].state()})

    def _note(self, kind: str, seen: dict[str, Any]) -> None:
        self.record[kind].append(seen)
        self.path.write_text(json.dumps(self.record))
        if kind == "bursts":
            state = {name: seen["state"].get(name) for name in STATE}
            typer.echo(f"{seen['domain']}: {burst_speed([seen]):.2f} of {speed([seen], FIXED):.0f} tok/s, {state}")


def speed(sample: Sequence[Mapping[str, Any]], side: str) -> float:
    tokens, seconds = (sum(each[side][name] for each in sample) for name in ("tokens", "seconds"))
    return float(tokens / seconds)


def ratios(answers: Sequence[Answers]) -> dict[str, tuple[float, float, float]]:
    """How many times the fixed side's acceptance length and tokens a second the learning side has.

    Each with the ends of a 95 % bootstrap interval over prompts.
    """

    def length(sample: Sequence[Answers], side: str) -> float:
        return verification_length(each[side] for each in sample)

    def gain(of: Callable[[Sequence[Answers], str], float]) -> tuple[float, float, float]:
        return interval(answers, lambda sample: of(sample, LEARNING) / of(sample, FIXED))

    return {"length": gain(length), "speed": gain(speed)}


def report(record: Mapping[str, Any], console: Console) -> None:
    """Held-out prompts, then the bursts of each domain."""
    lines = Table("after", "asked", "prompts", "acceptance length", "tokens/s", "equal answers", title=record["model"])
    for each in record["held_out"]:
        answers = each["answers"]
        equal = sum(one[LEARNING]["text"] == one[FIXED]["text"] for one in answers)
        found = ratios(answers)
        cells = (f"{middle:.3f} ({low:.3f}–{high:.3f})" for middle, low, high in (found["length"], found["speed"]))
        lines.add_row(each["after"], each["set"], str(len(answers)), *cells, str(equal))
    console.print(lines)
    for domain in dict.fromkeys(each["domain"] for each in record["bursts"]):
        of_domain = [each for each in record["bursts"] if each["domain"] == domain]
        memory = max(each["state"].get("worker", {}).get("resident_bytes", 0) for each in of_domain) / 1e6
        state = {name: of_domain[-1]["state"].get(name) for name in STATE}
        console.print(
            f"{domain}, bursts: {burst_speed(of_domain):.3f} times the tokens/s; worker {memory:.0f} MB; {state}"
        )


def burst_speed(bursts: Sequence[Mapping[str, Any]]) -> float:
    """How many times the fixed side's tokens a second the learning side has, over some bursts together."""
    return speed(bursts, LEARNING) / speed(bursts, FIXED)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Tokens a verification in each burst, eight answers at a time."""
    figure = Figure(figsize=(7, 3), layout="tight")
    axes = figure.subplots()
    for side in (LEARNING, FIXED):
        lengths = [verification_length([each[side]]) for each in record["bursts"]]
        axes.plot(range(1, len(lengths) + 1), lengths, "o-", label=side)
    domains = [each["domain"] for each in record["bursts"]]
    for number, (domain, before) in enumerate(zip(domains, ["", *domains], strict=False)):
        if domain != before:
            axes.axvline(number + 0.5, color="grey", linestyle=":")
            axes.text(number + 0.6, axes.get_ylim()[0], domain, color="grey", va="bottom")
    axes.set(xlabel="burst", ylabel="tokens a verification")
    axes.legend()
    figure.savefig(path)


def main(
    model: Annotated[str, typer.Option(help="With a draft of this project.")] = "qwen2.5-coder-0.5b",
    domain: Annotated[list[str] | None, typer.Option(help="In order, also again; of DOMAIN-stream.jsonl.")] = None,
    data: Annotated[Path, typer.Option(help="Directory of the streams and of the evaluation prompts.")] = DATA,
    trial: Annotated[bool, typer.Option(help="Measure with trial prompts, to choose options by.")] = False,
    bursts: Annotated[int, typer.Option(min=1, help="Of each domain.")] = 15,
    each: Annotated[int, typer.Option(min=1, help="Requests of a burst.")] = 16,
    clients: Annotated[int, typer.Option(min=1, help="At once in a burst.")] = 8,
    pause: Annotated[int, typer.Option(min=0, help="Seconds after a burst.")] = 30,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts of a domain.")] = 30,
    others: Annotated[int, typer.Option(min=0, help="Held-out prompts of each set of another domain.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 256,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of engine.alignment; repeatable.")] = None,
    baseline: Annotated[
        bool, typer.Option(help="Train all weights (benchmarks.distillation), not an adapter.")
    ] = False,
    name: Annotated[str, typer.Option(help="First part of the record's name in benchmarks/results.")] = "hour",
) -> None:
    """Serves, asks, writes the record and its plot, and prints what it says."""
    domains = domain or ["law", "medicine"]
    files = sorted(data.glob(_TRIAL_SETS)) if trial else evaluation_files()
    chosen = {key.removesuffix("-trial"): value for key, value in read_sets(files, max(prompts, others)).items()}
    if trial:
        del chosen[HUMANEVAL]
    sets = {
        key: [messages[-1]["content"] for messages in value[: prompts if key in domains else others]]
        for key, value in chosen.items()
    }
    streams = {key: read_prompts([data / f"{key}-stream.jsonl"]) for key in domains}
    record = {"command": sys.argv[1:], "environment": environment(), "model": model, "bursts": [], "held_out": []}
    sizes = {"bursts": bursts, "each": each, "clients": clients, "pause": pause, "max_tokens": max_tokens}
    path = RESULTS / f"{name}-{model}.json"
    with tempfile.TemporaryDirectory(prefix="evospec-hour-") as state:
        learning = ["--engine.alignment.state_directory", state]
        for value in [*(BASELINE_OPTIONS if baseline else []), *(option or [])]:
            key, _, value = value.partition("=")
            learning += [f"--engine.alignment.{key}", value]
        keys = {LEARNING: new_key(), FIXED: new_key()}
        keys_file = Path(state) / "keys.toml"
        keys_file.write_text(_KEYS.format(*(hash_key(key) for key in keys.values())))
        learning += ["--keys-file", str(keys_file)]
        with ExitStack() as stack:
            server = stack.enter_context(serving(model, model, "hour", learning, BASELINE if baseline else PROGRAM))
            sides = {side: server.as_tenant(key) for side, key in keys.items()}
            if baseline:  # it changes the draft of all tenants
                sides[FIXED] = stack.enter_context(serving(model, model, "hour-fixed", ["--no-alignment.enabled"]))
            uvloop.run(Hour(sides, sets, sizes, record, path).run(domains, streams))
    report(record, Console(width=160))
    draw(record, path.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
