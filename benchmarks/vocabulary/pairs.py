"""Whether modes of ``benchmarks.vocabulary`` records differ beyond noise.

``python -m benchmarks.vocabulary.pairs FILE... --reference MODE``. Modes are compared on the same requests, so that
what a prompt does to all of them cancels. The standard error is by the jackknife: the ratio is taken again without each
request in turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.jackknife import jackknife_error
from benchmarks.common.runs import Record

Counts = Mapping[int, tuple[int, int]]
"""By request: drafts verified, draft tokens accepted."""


@dataclass(frozen=True)
class Ratio:
    """An estimate and its standard error."""

    value: float
    error: float


def counts_of(runs: Iterable[Record], mode: str, domain: str) -> dict[int, tuple[int, int]]:
    """A mode's counts in a domain by the request's number; requests without a draft are left out."""
    chosen = (run for run in runs if (run["mode"], run["domain"]) == (mode, domain) and run["acceptance"]["drafted"])
    return {run["round"]: (run["acceptance"]["drafted"][0], sum(run["acceptance"]["accepted"])) for run in chosen}


def compare(ours: Counts, theirs: Counts) -> Ratio | None:
    """Ratio of the acceptance lengths on the requests that both have; None where they share fewer than two."""
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < 2:
        return None
    ratios = [_ratio(ours, theirs, [other for other in shared if other != number]) for number in shared]
    return Ratio(_ratio(ours, theirs, shared), jackknife_error(ratios))


def _ratio(ours: Counts, theirs: Counts, numbers: Sequence[int]) -> float:
    return _length([ours[number] for number in numbers]) / _length([theirs[number] for number in numbers])


def _length(counts: Sequence[tuple[int, int]]) -> float:
    return 1 + sum(accepted for _, accepted in counts) / sum(drafts for drafts, _ in counts)


def mean(ratios: Sequence[Ratio]) -> Ratio:
    """Of independent ones, such as those of several domains."""
    error = math.sqrt(sum(ratio.error**2 for ratio in ratios)) / len(ratios)
    return Ratio(fmean(ratio.value for ratio in ratios), error)


def table(runs: Sequence[Record], domains: Sequence[str], modes: Sequence[str], reference: str) -> Table:
    """A line for each mode: its acceptance length over the reference's, by domain and in the mean."""
    result = Table("mode", *domains, "mean", title=f"acceptance length / {reference}'s, ± standard error")
    for mode in modes:
        pairs = [compare(counts_of(runs, mode, domain), counts_of(runs, reference, domain)) for domain in domains]
        known = [pair for pair in pairs if pair is not None]
        cells = [*pairs, mean(known) if known else None]
        result.add_row(mode, *("–" if cell is None else f"{cell.value:.4f} ± {cell.error:.4f}" for cell in cells))
    return result


def main(
    records: Annotated[list[Path], typer.Argument(help="Of parts modes or sources, on the same prompts.")],
    reference: Annotated[str, typer.Option(help="Mode to compare with.")],
) -> None:
    """Prints acceptance lengths as ratios to one mode's, with standard errors."""
    contents = [json.loads(path.read_text()) for path in records]
    runs = [run for content in contents for run in content["runs"]]
    modes = list(dict.fromkeys(run["mode"] for run in runs))
    Console(width=160).print(table(runs, contents[0]["plan"]["domains"], modes, reference))


if __name__ == "__main__":
    typer.run(main)
