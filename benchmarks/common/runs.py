"""The runs of a record by model, mode, domain and concurrency, and what some of them come to together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.common.acceptance import Acceptance, total

Record = dict[str, Any]
ALL = "all"
"""Instead of a domain: all of them together."""


def runs_of(record: Record, model: str, mode: str, domain: str, concurrency: int | None = None) -> list[Record]:
    """The runs of a cell, or of all concurrencies; ``ALL``: of all domains."""
    return [
        run
        for run in record["runs"]
        if (run["model"], run["mode"]) == (model, mode)
        and domain in (ALL, run["domain"])
        and concurrency in (None, run.get("concurrency"))
    ]


def speeds(runs: Iterable[Record], domains: Sequence[str]) -> dict[int, float]:
    """Tokens a second by round: all tokens over all seconds, in the rounds that have every domain."""
    by_round: dict[int, list[Record]] = defaultdict(list)
    for run in runs:
        by_round[run["round"]].append(run)
    return {
        number: sum(run["tokens"] for run in group) / sum(run["seconds"] for run in group)
        for number, group in sorted(by_round.items())
        if {run["domain"] for run in group} == set(domains)
    }


def ratios(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Ours over theirs in each round that has both."""
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def acceptance(runs: Iterable[Record]) -> Acceptance:
    """All counts together."""
    return total(Acceptance(**run["acceptance"]) for run in runs)
