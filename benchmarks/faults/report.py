"""Counts and table of a ``benchmarks.faults`` record; also ``python -m benchmarks.faults.report FILE.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.faults.requests import Finished, Outcome

_TOLD = (Outcome.CUT, Outcome.REFUSED)
"""What the product promises while there is no engine: a clear error (docs/operations.md)."""


@dataclass
class Seen:
    """What one fault did. ``ways`` counts how it was injected; ``seconds`` until all was as before, by repeat."""

    about: str
    kills_engine: bool
    ways: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    not_recovered: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    num_versions: int = 0
    missed: int = 0

    @property
    def repeats(self) -> int:
        """Times that it was injected."""
        return len(self.seconds) + len(self.not_recovered)

    def take(self, finished: Sequence[Finished]) -> None:
        self.outcomes.update(one.outcome.value for one in finished)
        self.messages.update(one.message for one in finished if one.message)

    def record(self) -> dict[str, Any]:
        """All of it, and the fault's row; requests cut or refused count as failed if there was an engine all along."""
        count = {outcome: self.outcomes.get(outcome.value, 0) for outcome in Outcome}
        told = {outcome.value: count[outcome] if self.kills_engine else 0 for outcome in _TOLD}
        failed = count[Outcome.FAILED] + sum(count[outcome] for outcome in _TOLD if not self.kills_engine)
        changed = count[Outcome.CHANGED]
        return vars(self) | {
            "repeats": self.repeats,
            "requests": sum(count.values()),
            "failed": failed,
            "changed": changed,
            **told,
            "monotonic": not self.violations,
            "recovered": len(self.seconds),
            "median_seconds": median(self.seconds) if self.seconds else None,
            "longest_seconds": max(self.seconds, default=None),
            "holds": not (failed or changed or self.violations or self.not_recovered),
        }


def table(record: dict[str, Any]) -> Table:
    plan = record["plan"]
    result = Table(title=f"Faults under load, {plan['clients']} clients, {plan['max_tokens']} tokens a request")
    for header in ("fault", "how"):
        result.add_column(header)
    for header in ("repeats", "requests", "failed", "changed", "cut off", "refused", "versions", "monotonic"):
        result.add_column(header, justify="right")
    for header in ("recovered", "median s", "longest s"):
        result.add_column(header, justify="right")
    for name, one in record["faults"].items():
        ways = [f"{count} {way}" for way, count in one["ways"].items() if way]
        seconds = [f"{one[key]:.1f}" if one[key] is not None else "–" for key in ("median_seconds", "longest_seconds")]
        counts = [one[key] for key in ("repeats", "requests", "failed", "changed", "cut", "refused", "num_versions")]
        result.add_row(
            name,
            "; ".join([one["about"], *ways]),
            *map(str, counts),
            "yes" if one["monotonic"] else "NO",
            f"{one['recovered']} of {one['repeats']}",
            *seconds,
        )
    return result


def main(record: Annotated[Path, typer.Argument(help="A JSON file of benchmarks.faults.")]) -> None:
    """Prints the table of a record again."""
    Console(width=180).print(table(json.loads(record.read_text())))


if __name__ == "__main__":
    typer.run(main)
