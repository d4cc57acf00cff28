"""What the model says of fleets, small ones beside what real replicas do: ``python -m benchmarks.fleet.simulation``."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.common.process import wait_for_quiet
from benchmarks.fleet.simulation.fit import Run, fit, probe, run
from benchmarks.fleet.simulation.measure import running_fleet
from benchmarks.fleet.simulation.replica import Costs
from benchmarks.fleet.simulation.report import print_record
from benchmarks.fleet.simulation.scale import RINGS, Plan, serve, shared
from benchmarks.fleet.simulation.traces import Scale, make_conversations

_COUNTS = (1, 2, 4)
"""Replicas that are measured; the model is fitted to the first."""
_QUIET_SECONDS = 300.0
_MOST_OTHERS = 0.3
"""Cores that other programs may take meanwhile. What they took, the model does without."""


class Part(StrEnum):
    """What is done."""

    MEASURE = "measure"
    SCALE = "scale"


async def measure(rate: float, seconds: float, console: Console) -> dict[str, Any]:
    """Real fleets, and the model of them; what two and four replicas are told, one does not hear."""
    scale, runs, probed = Scale(pause=10.0), dict[int, Run](), None
    for count in _COUNTS:
        conversations = make_conversations(rate * min(count, 2), seconds, scale, seed=count)
        console.print(f"[dim]{count} replicas, {len(conversations)} conversations[/dim]")
        await asyncio.to_thread(wait_for_quiet, _QUIET_SECONDS)
        async with running_fleet(count) as fleet:
            probed = probed or await probe(fleet)
            runs[count] = await run(fleet, conversations, scale)
        if runs[count].others > _MOST_OTHERS:
            raise RuntimeError(f"other programs took {runs[count].others:.1f} cores: times would mean nothing")
    assert probed is not None
    costs = fit(probed, runs[_COUNTS[0]])
    fleets = {str(count): compare(one, costs) for count, one in runs.items()}
    return {"rate": rate, "seconds": seconds, "scale": asdict(scale), "costs": asdict(costs), "fleets": fleets}


def compare(one: Run, costs: Costs) -> dict[str, Any]:
    """A real fleet beside the model of it."""
    return {
        "others": one.others,
        "step_costs": one.step_costs,
        "redis_calls": one.redis_calls,
        "redis_call_seconds": one.redis_call_seconds,
        "measured": one.measured(),
        "simulated": one.simulated(costs),
    }


def enlarge(costs: Costs, call_seconds: float, plan: Plan, console: Console) -> list[dict[str, Any]]:
    """Large fleets, by the places of their replicas on the ring."""
    rows = []
    for size, ring, ring_size in RINGS:
        console.print(f"[dim]{size:,} replicas, {ring}[/dim]")
        served = serve(costs, plan, size, ring_size)
        rows.append({"replicas": size, "ring": ring, **served, **shared(served, size, call_seconds)})
    return rows


def main(
    only: Annotated[Part | None, typer.Option(help="Default: both.")] = None,
    rate: Annotated[float, typer.Option(min=0.01, help="Conversations a second that begin at one replica.")] = 0.5,
    seconds: Annotated[float, typer.Option(min=10, help="Of a measured run.")] = 150.0,
) -> None:
    """Writes benchmarks/results/fleet-simulation.json; with ``--only`` the other part is left as it is there."""
    console, path = Console(width=160), RESULTS / "fleet-simulation.json"
    record = json.loads(path.read_text()) if only is not None and path.exists() else {}
    if only is not Part.SCALE:
        record |= {"environment": environment()} | asyncio.run(measure(rate, seconds, console))
    if only is not Part.MEASURE:
        call_seconds = record["fleets"]["1"]["redis_call_seconds"]
        record["large"] = enlarge(Costs(**record["costs"]), call_seconds, Plan(rate), console)
    path.write_text(json.dumps(record, indent=1))
    print_record(record, console)


if __name__ == "__main__":
    typer.run(main)
