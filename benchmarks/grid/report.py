"""What a record of the grid comes to: ``python -m benchmarks.grid.report FILE``."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.load import percentiles
from benchmarks.grid.plan import DEFAULT

Requests = Sequence[Mapping[str, Any]]
SAMPLES = 1000
"""Of the bootstrap."""


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a record."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def ratio(ours: Requests, theirs: Requests) -> tuple[float, float, float]:
    """How many times the tokens a second, and between what 95 of 100 samples of the prompts have it."""
    pairs = [(one["cost"], other["cost"]) for one, other in zip(ours, theirs, strict=True)]

    def of(sample: Iterable[tuple[float, float]]) -> float:
        mine, others = map(sum, zip(*sample, strict=True))
        return float(others / mine)

    rng = random.Random(0)
    samples = sorted(of(rng.choices(pairs, k=len(pairs))) for _ in range(SAMPLES))
    return of(pairs), samples[SAMPLES // 40], samples[-SAMPLES // 40]


def of_side(cells: Sequence[Mapping[str, Any]], side: str) -> list[Mapping[str, Any]]:
    """Its requests in some cells."""
    return [request for cell in cells for request in cell["sides"][side]["requests"]]


def table(cells: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The sides in some cells: their speed, how many times it the default has, over all and by prompts."""
    names = [cell["prompts"] for cell in cells]
    lines = Table("side", title=title)
    for header in ("tokens/s", "first, ms", "gaps p50 p90 p99, ms", "accepted", "default to it", *names):
        lines.add_column(header, justify="right")
    for side in cells[0]["sides"]:
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
    """One for each temperature and load."""
    ordered = sorted(cells, key=lambda cell: (cell["temperature"], cell["load"]))
    grouped = groupby(ordered, key=lambda cell: (cell["temperature"], cell["load"]))
    return [
        table(list(of_group), f"temperature {temperature}, {load} at a time")
        for (temperature, load), of_group in grouped
    ]


def main(path: Annotated[Path, typer.Argument(help="Of a record.")]) -> None:
    """Print a record's tables."""
    for one in tables(read(path)):
        Console(width=220).print(one)


if __name__ == "__main__":
    typer.run(main)
