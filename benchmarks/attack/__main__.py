"""Attacks on servers of this suite's own, on loopback: ``python -m benchmarks.attack`` runs all, or those named.

What hurts an attack's bar is in the table at the end; any bar that does not hold exits with 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.attack.attacks import ATTACKS, Options
from benchmarks.attack.report import AFTER, BEFORE, Record
from benchmarks.common.machine import REPOSITORY, RESULTS


def main(
    attack: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ATTACKS)}; default: all but soak.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Checkout whose server is attacked instead of this one's, as the side before.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of each fuzzer.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the fuzzers.")] = 1,
    seeds: Annotated[str, typer.Option(help="Of the requests of determinism, separated by commas.")] = "1",
    minutes: Annotated[float, typer.Option(help="Of soak.")] = 60.0,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "attack",
) -> None:
    """Measures what the victims of each attack notice; bars that do not hold exit with 1."""
    names = attack or [one for one in ATTACKS if one != "soak"]
    if unknown := set(names) - ATTACKS.keys():
        raise typer.BadParameter(f"no such attack: {', '.join(sorted(unknown))}", param_hint="ATTACK")
    console, record = Console(width=160), Record(RESULTS / f"{name}.json")
    side, directory = (AFTER, REPOSITORY) if source is None else (BEFORE, source.resolve())
    of_requests, checkpoints = tuple(map(int, seeds.split(","))), RESULTS / f"{name}-soak.jsonl"
    options = Options(directory, seconds, seed, of_requests, minutes, checkpoints)
    for one in names:
        console.print(f"[dim]{one}, {side}[/dim]")
        figures = ATTACKS[one].run(options)
        console.print(f"[dim]{json.dumps(figures)}[/dim]")
        record.add(one, side, directory, figures)
    console.print(record.table())
    bars = [(one, figure, bar) for one in names for figure, bar in ATTACKS[one].bars.items()]
    raise typer.Exit(1 if any(record.holds(*one) is False for one in bars) else 0)


if __name__ == "__main__":
    typer.run(main)
