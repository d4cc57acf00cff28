"""What the vocabulary of a long conversation costs, in bytes and in milliseconds of a step.

``python -m benchmarks.vocabulary.conversation``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.acceptance import Run
from benchmarks.common.in_process import Generation
from benchmarks.common.process import NoiseMeter
from benchmarks.prompts.build import Prompt
from benchmarks.prompts.sets import DOMAINS, short_prompts
from benchmarks.vocabulary.modes import sizes_of
from benchmarks.vocabulary.sessions import Ask, Labels, answers, make_sides, recorded
from evospec.server.bench.load import percentiles

MAX_TOKENS = 48
QUESTIONS_IN_A_ROW = 10
"""From a domain, before the next one's."""


def asks(prompts: Mapping[str, Sequence[Prompt]], turns: int) -> Iterator[tuple[Labels, Ask]]:
    """Questions from all domains in turn."""
    for turn in range(turns):
        block, place = divmod(turn, QUESTIONS_IN_A_ROW)
        before, domain = divmod(block, len(prompts))
        prompt = list(prompts.values())[domain][before * QUESTIONS_IN_A_ROW + place]
        yield {"turn": turn}, Ask(prompt.messages, "conversation", "tenant", goes_on=True)


def costs(run: Generation) -> dict[str, Any]:
    """Bytes of the session's snapshot; milliseconds of each step without a prompt, and of its learning."""
    [snapshot] = run.snapshots
    return {
        "snapshot_bytes": len(snapshot or b""),
        "step_ms": [1e3 * (s.schedule + s.forward + s.sample + s.commit + s.draft) for s in run.decode_steps],
        "learning_ms": [1e3 * step.vocabulary for step in run.decode_steps],
    }


def table(runs: Sequence[Run], title: str) -> Table:
    """A line for each mode; the first turn's steps warm the engine up and do not count."""
    headers = "bytes after one turn", "at the end", "step ms p50 p90 p99", "learning ms p50 p90 p99"
    lines = Table("mode", *headers, title=title)
    for mode in dict.fromkeys(run["mode"] for run in runs):
        ours = [run for run in runs if run["mode"] == mode]
        sizes = (f"{run['snapshot_bytes']:,}" for run in (ours[0], ours[-1]))
        times = (percentiles([ms for run in ours[1:] for ms in run[key]]) for key in ("step_ms", "learning_ms"))
        lines.add_row(mode, *sizes, *(" ".join(f"{value:.2f}" for value in astuple(of)) for of in times))
    return lines


def main(
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    mode: Annotated[list[str] | None, typer.Option(help="Repeatable, see modes.py.")] = None,
    turns: Annotated[int, typer.Option(min=2, max=160, help="Of the conversation.")] = 32,
    name: Annotated[str, typer.Option(help="Of the record.")] = "vocabulary-conversation",
) -> None:
    """Size of a session's snapshot, and what steps and learning take."""
    sides, noise = make_sides(mode or ["static:1024", sizes_of(model).ours], model), NoiseMeter()
    requests = asks(short_prompts(model, DOMAINS), turns)
    done = (labels | costs(run) for labels, run in answers(sides, requests, MAX_TOKENS))
    runs = recorded(name, {"model": model, "turns": turns, "max_tokens": MAX_TOKENS}, done)
    Console(width=160).print(table(runs, f"{model}, {turns} turns, other load {noise.read():.0f} %"))


if __name__ == "__main__":
    typer.run(main)
