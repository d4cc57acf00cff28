"""What becomes of a session that changes its topic: ``python -m benchmarks.vocabulary.switch``.

Lengths are shown as shares of the first mode's on the same prompts, so that prompts' difficulty cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.common.acceptance import Run, length
from benchmarks.common.machine import RESULTS
from benchmarks.prompts.build import Prompt
from benchmarks.prompts.sets import short_prompts
from benchmarks.vocabulary.modes import FULL, PAPER, sizes_of
from benchmarks.vocabulary.sessions import Ask, Labels, answers, counts, make_sides, recorded

TOPICS = ("law", "medicine", "code")
"""Of a session, one after the other."""
SESSIONS, MAX_TOKENS = 2, 64
SMOOTHING = 3
"""Requests whose acceptance is taken together."""
SETTLED_SHARE = 0.95


def asks(prompts: Mapping[str, Sequence[Prompt]], number: int) -> Iterator[tuple[Labels, Ask]]:
    """``number`` prompts of each topic; a session is a tenant's only one, and has prompts of its own."""
    for session in range(SESSIONS):
        for stage, topic in enumerate(TOPICS):
            for place in range(number):
                prompt = prompts[topic][session * number + place]
                labels = {"topic": topic, "session": session, "place": stage * number + place}
                yield labels, Ask(prompt.messages, f"session-{session}", f"tenant-{session}")


def lengths(runs: Sequence[Run], mode: str) -> dict[int, float]:
    """Acceptance length by place in the session, of all sessions together, each with the topic's next ones."""
    found: dict[int, float] = {}
    for place, topic in sorted({(run["place"], run["topic"]) for run in runs}):
        of_topic = [run for run in runs if (run["mode"], run["topic"]) == (mode, topic)]
        value = length(run for run in of_topic if 0 <= run["place"] - place < SMOOTHING)
        if not math.isnan(value):
            found[place] = value
    return found


def shares(runs: Sequence[Run], mode: str) -> dict[int, float]:
    """Of the first mode's length, by place in the session."""
    ours, theirs = lengths(runs, mode), lengths(runs, runs[0]["mode"])
    return {place: ours[place] / theirs[place] for place in sorted(ours.keys() & theirs.keys())}


def settled_after(values: Sequence[float]) -> int:
    """Requests before the first whose value is near enough to the steady state, which is the mean of the later half."""
    steady = fmean(values[len(values) // 2 :])
    return next(place for place, value in enumerate(values) if value >= SETTLED_SHARE * steady)


def table(runs: Sequence[Run], title: str) -> Table:
    settled = f"requests to {SETTLED_SHARE:.0%} of steady"
    lines = Table("mode", "topic", "acceptance length", "share at first", "steady share", settled, title=title)
    for mode, topic in dict.fromkeys((run["mode"], run["topic"]) for run in runs):
        ours = [run for run in runs if (run["mode"], run["topic"]) == (mode, topic)]
        places, by_place = {run["place"] for run in ours}, shares(runs, mode)
        values = [share for place, share in by_place.items() if place in places]
        if values:
            steady = fmean(values[len(values) // 2 :])
            cells = f"{length(ours):.2f}", f"{values[0]:.2f}", f"{steady:.2f}", str(settled_after(values))
            lines.add_row(mode, topic, *cells)
    return lines


def plot(runs: Sequence[Run], path: Path) -> None:
    """Lengths, and their shares of the first mode's, over the requests of the session."""
    figure = Figure(figsize=(14, 5), layout="tight")
    left, right = figure.subplots(1, 2)
    for mode in dict.fromkeys(run["mode"] for run in runs):
        for panel, values in ((left, lengths(runs, mode)), (right, shares(runs, mode))):
            panel.plot(list(values), list(values.values()), label=mode, marker=".")
    first = {run["topic"]: run["place"] for run in reversed(runs)}
    for panel in (left, right):
        for topic, place in first.items():
            panel.axvline(place - 0.5, color="#9ca3af", linewidth=0.8)
            panel.text(place - 0.4, 0.98, topic, transform=panel.get_xaxis_transform(), va="top", fontsize=8)
        panel.set(xlabel="request of the session")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    left.set(ylabel="acceptance length")
    right.set(ylabel=f"acceptance length / that of {runs[0]['mode']} on the same prompts")
    figure.savefig(path, dpi=130)


def main(
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    mode: Annotated[list[str] | None, typer.Option(help="Repeatable, see modes.py.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=20, help="Of each topic and session.")] = 8,
    name: Annotated[str, typer.Option(help="Of the record and the plot.")] = "vocabulary-switch",
) -> None:
    """Acceptance length before and after a change of topic."""
    sizes = sizes_of(model)
    sides = make_sides(mode or [FULL, f"static:{sizes.statics[0]}", sizes.ours, f"{PAPER}{sizes.fr_spec}"], model)
    requests = asks(short_prompts(model, TOPICS), prompts)
    done = (labels | counts(run) for labels, run in answers(sides, requests, MAX_TOKENS))
    runs = recorded(name, {"model": model, "prompts": prompts, "max_tokens": MAX_TOKENS}, done)
    plot(runs, RESULTS / f"{name}.png")
    Console(width=160).print(table(runs, f"{model}, greedy, {MAX_TOKENS} tokens a request"))


if __name__ == "__main__":
    typer.run(main)
