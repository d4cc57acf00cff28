"""How long accepted drafts are, how that compares with another mode, and how sure both are.

A run is what a mode did with a request: ``mode``, ``set`` (of prompts), ``number`` (of the request in its set),
``drafts`` (that were verified) and ``accepted`` (of their tokens). Modes are compared on the same requests, so that
what a prompt does to all of them cancels. Standard errors are by the jackknife: the figure is taken again without each
request in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from rich.table import Table

Run = Mapping[str, Any]
_Request = TypeVar("_Request")


@dataclass(frozen=True)
class Estimate:
    value: float
    error: float

    def in_tokens(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"

    def in_percent(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f}"


def length(runs: Iterable[Run]) -> float:
    """Tokens for each verified draft, the target's own included; NaN without drafts."""
    counts = [(run["drafts"], run["accepted"]) for run in runs]
    drafts = sum(number for number, _ in counts)
    return 1 + sum(accepted for _, accepted in counts) / drafts if drafts else math.nan


def ratio(pairs: Sequence[tuple[Run, Run]]) -> float:
    """The first ones' acceptance length over the second ones'."""
    return length(ours for ours, _ in pairs) / length(theirs for _, theirs in pairs)


def paired(ours: Iterable[Run], theirs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """The runs of two modes on the same requests of a set."""
    known = {run["number"]: run for run in theirs}
    return [(run, known[run["number"]]) for run in ours if run["number"] in known]


def estimate(requests: Sequence[_Request], figure: Callable[[Sequence[_Request]], float]) -> Estimate | None:
    """A figure of some requests; None of fewer than two."""
    if len(requests) < 2:
        return None
    without = [figure([*requests[:place], *requests[place + 1 :]]) for place in range(len(requests))]
    middle = fmean(without)
    squares = sum((one - middle) ** 2 for one in without)
    return Estimate(figure(requests), math.sqrt((1 - 1 / len(without)) * squares))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Of independent ones, such as those of several sets."""
    error = math.hypot(*(one.error for one in estimates)) / len(estimates)
    return Estimate(fmean(one.value for one in estimates), error)


def table(runs: Sequence[Run], title: str) -> Table:
    """A line for each mode, by set and in the mean: the first mode's lengths in tokens, others' in percent of those."""
    modes, sets = (list(dict.fromkeys(run[key] for run in runs)) for key in ("mode", "set"))
    lines = Table("mode", *sets, "mean", title=f"{title}: acceptance length, others in % of {modes[0]}'s")

    def runs_of(mode: str, name: str) -> list[Run]:
        return [run for run in runs if (run["mode"], run["set"]) == (mode, name) and run["drafts"]]

    def add(mode: str, cells: list[Estimate | None], text: Callable[[Estimate], str]) -> None:
        known = [cell for cell in cells if cell is not None]
        all_cells = [*cells, mean(known) if known else None]
        lines.add_row(mode, *("–" if cell is None else text(cell) for cell in all_cells))

    add(modes[0], [estimate(runs_of(modes[0], name), length) for name in sets], Estimate.in_tokens)
    for mode in modes[1:]:
        pairs = (paired(runs_of(mode, name), runs_of(modes[0], name)) for name in sets)
        add(mode, [estimate(of_set, ratio) for of_set in pairs], Estimate.in_percent)
    return lines
