"""What the model says of fleets, small ones beside what real replicas do: ``python -m benchmarks.fleet.simulation``."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.common.process import wait_for_quiet
from benchmarks.fleet.simulation.figures import figures, interval_of
from benchmarks.fleet.simulation.fit import Run, fit, probe, run
from benchmarks.fleet.simulation.measure import running_fleet
from benchmarks.fleet.simulation.replica import Costs
from benchmarks.fleet.simulation.report import print_record
from benchmarks.fleet.simulation.scale import RINGS, serve, shared

_COUNTS = ("1", "2", "4")
"""Replicas that are measured; the model is fitted to the first."""
_LARGE = "large"
_QUIET_SECONDS = 60.0
_MOST_OTHERS = 0.3
"""Cores that other programs may take meanwhile. What they took, the model does without."""


async def measure(count: str, record: dict[str, Any]) -> None:
    """Tell so many real replicas conversations; what came of it goes into the record."""
    await asyncio.to_thread(wait_for_quiet, _QUIET_SECONDS)
    async with running_fleet(int(count)) as fleet:
        await asyncio.to_thread(wait_for_quiet, _QUIET_SECONDS)  # the replicas still check their model's files
        if count == _COUNTS[0]:
            record["probed"] = asdict(await probe(fleet))
        one = await run(fleet)
    record.setdefault("runs", {})[count] = {"environment": environment()} | asdict(one)


def compare(record: dict[str, Any]) -> None:
    """Fit the model to one replica, and put it beside each real fleet."""
    runs = {count: msgspec.convert(found, Run) for count, found in record["runs"].items()}
    costs = fit(Costs(**record["probed"]), runs[_COUNTS[0]])
    record["costs"] = asdict(costs)
    record["fleets"] = {
        count: {
            "measured": one.measured(),
            "intervals": {name: interval_of(one.served, name) for name in figures(one.served)},
            "simulated": one.simulated(one.as_it_was(costs)),
        }
        for count, one in runs.items()
    }


def enlarge(record: dict[str, Any], console: Console) -> None:
    """Large fleets, by the places of their replicas on the ring."""
    costs, redis = Costs(**record["costs"]), record["runs"][_COUNTS[0]]["redis"]
    call_seconds = redis["redis_seconds"] / redis["redis_calls"]
    record["large"] = []
    for size, ring, ring_size in RINGS:
        console.print(f"[dim]{size:,} replicas, {ring}[/dim]")
        served = serve(costs, size, ring_size)
        record["large"].append({"replicas": size, "ring": ring, **served, **shared(served, size, call_seconds)})


def main(
    part: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join((*_COUNTS, _LARGE))}; default: all, one after the other.")
    ] = None,
) -> None:
    """Writes benchmarks/results/fleet-simulation.json; parts that were not asked for stay as they are there.

    Exits with 1 if other programs took so much of the machine meanwhile that times mean nothing.
    """
    console, path = Console(width=160), RESULTS / "fleet-simulation.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    asked = part or (*_COUNTS, _LARGE)
    measured = [one for one in asked if one != _LARGE]
    for one in measured:
        console.print(f"[dim]{one}[/dim]")
        asyncio.run(measure(one, record))
        path.write_text(json.dumps(record) + "\n")
    if measured:
        compare(record)
    if _LARGE in asked:
        enlarge(record, console)
    path.write_text(json.dumps(record) + "\n")
    print_record(record, console)
    raise typer.Exit(max(one["others"] for one in record["runs"].values()) > _MOST_OTHERS)


if __name__ == "__main__":
    typer.run(main)
