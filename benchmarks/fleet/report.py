"""Counts and tables of a ``benchmarks.fleet`` record; also ``python -m benchmarks.fleet.report FILE.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fleet.conversations import Finished, Outcome
from evospec.server.bench.load import percentiles
from evospec.server.bench.stream import StreamResult


def acceptance(results: Sequence[StreamResult]) -> float:
    """Tokens for each step that verified a draft, the recovered or bonus token included."""
    told = [result.speculation for result in results if result.speculation is not None]
    return 1 + sum(one.num_accepted_draft_tokens for one in told) / max(1, sum(one.num_spec_steps for one in told))


def phase_record(finished: Sequence[Finished], seconds: float) -> dict[str, Any]:
    """What came of the requests that ended in a phase; times in seconds."""
    outcomes = Counter(one.outcome for one in finished)
    answered = [one.result for one in finished if one.outcome in (Outcome.RIGHT, Outcome.WRONG)]
    gaps = [b - a for one in answered for a, b in zip(one.token_times, one.token_times[1:], strict=False)]
    return {
        "seconds": round(seconds, 1),
        "requests": len(finished),
        **{outcome.value: outcomes[outcome] for outcome in Outcome},
        "sessions_lost": sum(one.is_lost for one in finished),
        "turns_not_saved": sum(not one.is_saved for one in finished),
        "ttft": asdict(percentiles([one.token_times[0] - one.start for one in answered if one.token_times])),
        "itl": asdict(percentiles(gaps)),
        "errors": dict(Counter(one.result.error[:200] for one in finished if one.result.error)),
    }


def table(record: dict[str, Any]) -> Table:
    plan = record["plan"]
    title = f"{plan['replicas']} replicas behind {plan['router']}, {plan['sessions']} sessions"
    result = Table(title=title)
    result.add_column("phase")
    headers = ("seconds", "requests", "right", "wrong", "cut", "failed", "sessions lost", "turns not saved")
    for header in (*headers, "TTFT ms p50", "p99", "ITL ms p50", "p99"):
        result.add_column(header, justify="right")
    for name, phase in record["phases"].items():
        counts = [phase[header.replace(" ", "_")] for header in headers]
        times = [phase[what][which] for what in ("ttft", "itl") for which in ("p50", "p99")]
        result.add_row(name, *map(str, counts), *(f"{1e3 * time:.0f}" for time in times))
    return result


def moves(record: dict[str, Any]) -> str:
    one = record["moves"]
    return (
        f"acceptance length of sessions that stay {one['stays']:.3f}, that move at each turn {one['moves']:.3f} "
        f"({100 * (one['moves'] / one['stays'] - 1):+.1f} %); {one['different']} of {one['answers']} answers differ"
    )


def main(record: Annotated[Path, typer.Argument(help="A JSON file of benchmarks.fleet.")]) -> None:
    """Prints a record again."""
    console, read = Console(width=180), json.loads(record.read_text())
    console.print(table(read))
    console.print(moves(read))


if __name__ == "__main__":
    typer.run(main)
