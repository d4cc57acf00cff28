"""What a record of the grid comes to: ``python -m benchmarks.grid.report FILE``."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.bootstrap import interval
from benchmarks.grid.plan import DEFAULT
from evospec.server.bench.load import percentiles

Requests = Sequence[Mapping[str, Any]]
MOST_IN_LOOPS = 0.1
_LOOP = re.compile(r"(.{8,300}?)\1{2,}", re.DOTALL)


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a record."""
    if not path.is_file():
        return []
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def ratio(ours: Requests, theirs: Requests) -> tuple[float, float, float]:
    """How many times the tokens a second, and between what 95 of 100 samples of the prompts have it."""
    pairs = [(one["cost"], other["cost"]) for one, other in zip(ours, theirs, strict=True)]

    def of(sample: Iterable[tuple[float, float]]) -> float:
        mine, others = map(sum, zip(*sample, strict=True))
        return float(others / mine)

    return interval(pairs, of)


def loop_share(text: str) -> float:
    """How much of a text is in passages that are said at least three times in a row."""
    return sum(len(found[0]) for found in _LOOP.finditer(text)) / max(len(text), 1)


def without_loops(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell without the requests whose answers are loops for more than ``MOST_IN_LOOPS`` of their text."""
    kept = [place for place, text in enumerate(cell["texts"]) if loop_share(text) <= MOST_IN_LOOPS]
    sides = {name: {"requests": [side["requests"][place] for place in kept]} for name, side in cell["sides"].items()}
    return {**cell, "texts": [cell["texts"][place] for place in kept], "sides": sides}


def of_side(cells: Sequence[Mapping[str, Any]], side: str) -> list[Mapping[str, Any]]:
    """Its requests in some cells."""
    return [request for cell in cells for request in cell["sides"][side]["requests"]]


def sides_of_all(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sides that are in all cells."""
    return [side for side in cells[0]["sides"] if all(side in cell["sides"] for cell in cells)]


def table(cells: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The sides in some cells: their speed, how many times it the default has, over all and by prompts."""
    names = [cell["prompts"] for cell in cells]
    lines = Table("side", title=title)
    for header in ("tokens/s", "first, ms", "gaps p50 p90 p99, ms", "accepted", "default to it", *names):
        lines.add_column(header, justify="right")
    for side in sides_of_all(cells):
        requests = of_side(cells, side)
        speed = sum(one["num_tokens"] for one in requests) / sum(one["cost"] for one in requests)
        first = percentiles([one["first"] for one in requests]).p50
        gaps = percentiles([gap for one in requests for gap in one["gaps"]])
        drafted = sum(one["drafted"] for one in requests)
        share = f"{sum(one['accepted'] for one in requests) / drafted:.0%}" if drafted else ""
        middle, low, high = ratio(of_side(cells, DEFAULT), requests)
        by_prompts = (ratio(of_side([cell], DEFAULT), of_side([cell], side))[0] for cell in cells)
        lines.add_row(
            side,
            f"{speed:.0f}",
            f"{1e3 * first:.0f}",
            " ".join(f"{1e3 * value:.0f}" for value in (gaps.p50, gaps.p90, gaps.p99)),
            share,
            f"{middle:.2f} ({low:.2f}–{high:.2f})",
            *(f"{value:.2f}" for value in by_prompts),
        )
    return lines


def tables(cells: Iterable[Mapping[str, Any]]) -> list[Table]:
    """Two for each temperature and load: with all answers, and without those that are loops."""
    found = []
    ordered = sorted(cells, key=lambda cell: (cell["temperature"], cell["load"]))
    for (temperature, load), of_group in groupby(ordered, key=lambda cell: (cell["temperature"], cell["load"])):
        group, title = list(of_group), f"temperature {temperature}, {load} at a time"
        shares = [loop_share(text) for cell in group for text in cell["texts"]]
        found.append(table(group, f"{title}: all {len(shares)} answers, {fmean(shares):.0%} of their text in loops"))
        left = [cell for cell in map(without_loops, group) if cell["texts"]]
        count = sum(len(cell["texts"]) for cell in left)
        if 0 < count < len(shares):
            found.append(table(left, f"{title}: the {count} answers without loops"))
    return found


def main(path: Annotated[Path, typer.Argument(help="Of a record.")]) -> None:
    """Print a record's tables."""
    for one in tables(read(path)):
        Console(width=220).print(one)


if __name__ == "__main__":
    typer.run(main)
