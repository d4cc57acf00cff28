"""Tables and the plot of a record; also ``python -m benchmarks.fleet.simulation.report FILE.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.common.machine import RESULTS

_ACROSS = {
    "requests_a_second": "requests a second",
    "largest_share": "sessions of the busiest replica, times the mean",
    "stayed": "turns at their session's replica",
    "prefix_hits": "prompt tokens from the prefix cache",
    "first_token_p50": "first token, s, median",
    "first_token_p99": "first token, s, p99",
    "sessions_found": "turns that find their session in Redis",
    "calls_a_second": "Redis commands a second",
    "megabytes_a_second": "MB a second",
    "cores": "cores of Redis",
    "largest_tenant_cores": "of these, for the largest tenant",
    "gigabytes_kept": "GB of sessions in Redis",
    "learner_calls_a_second": "commands of learners a second",
    "learner_cores": "cores of Redis for learners",
    "tenants_a_minute": "tenants that a replica hears in a minute",
    "gigabytes_a_version": "GB read for a version of the largest tenant's adapter",
}


def print_record(record: dict[str, Any], console: Console) -> None:
    """All of it as Markdown, and the plot."""
    for count, fleet in record.get("fleets", {}).items():
        others = record["runs"][count]["others"]
        console.print(f"\n{count} replicas; others used {others:.2f} cores\n", highlight=False)
        rows = [("", "measured", "95 %", "simulated", "difference")]
        for name, measured in fleet["measured"].items():
            simulated = fleet["simulated"][name]
            difference = f"{100 * (simulated / measured - 1):+.1f} %" if measured else ""
            interval = " to ".join(f"{end:,.4g}" for end in fleet["intervals"].get(name, ()))
            rows.append((name, f"{measured:,.4g}", interval, f"{simulated:,.4g}", difference))
        _print(rows, console)
    large = record.get("large", [])
    if large:
        head = ("", *(f"{row['replicas']:,}, {row['ring']}" for row in large))
        _print([head, *((name, *(f"{row[key]:,.3g}" for row in large)) for key, name in _ACROSS.items())], console)
        plot(large, RESULTS / "fleet-simulation.png")


def _print(rows: Sequence[Sequence[str]], console: Console) -> None:
    for number, row in enumerate(rows):
        console.print("| " + " | ".join(row) + " |", highlight=False, soft_wrap=True)
        if number == 0:
            console.print("|" + "---|" * len(row), highlight=False, soft_wrap=True)


def plot(large: Sequence[dict[str, Any]], path: Path) -> None:
    """Hit rates by replicas and ring, and what Redis has to do."""
    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    names = [f"{row['replicas']:,}\n{row['ring']}" for row in large]
    for key, marker in (("stayed", "o"), ("prefix_hits", "s")):
        left.plot(names, [row[key] for row in large], marker, label=_ACROSS[key])
    rows = list({row["replicas"]: row for row in large}.values())  # the last, whose shares are the most even
    for key in ("cores", "largest_tenant_cores", "learner_cores"):
        right.plot([row["replicas"] for row in rows], [row[key] for row in rows], "o-", label=_ACROSS[key])
    left.set(ylabel="share", ylim=(0, 1.02))
    left.tick_params(axis="x", labelrotation=30, labelsize=7)
    right.set(xscale="log", yscale="log", xlabel="replicas", ylabel="cores")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(record: Annotated[Path, typer.Argument(help="fleet-simulation.json.")]) -> None:
    """Prints a record again."""
    print_record(json.loads(record.read_text()), Console(width=160))


if __name__ == "__main__":
    typer.run(main)
