"""Ray adds and removes replicas by what waits for them: ``python -m benchmarks.fleet.autoscaling``.

A few clients ask one replica; then as many ask as three replicas are for, until there are three, and for a while; then
few again, until there is one. Only Ray's delays differ from deploy/ray/serve.yaml.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import typer

from benchmarks.common.environment import environment
from benchmarks.common.machine import write_record
from benchmarks.fleet.conversations import make_conversations
from benchmarks.fleet.processes import new_replica, running_valkey
from benchmarks.fleet.ray_serve import RayRouter, replica_states
from evospec.server.bench.load import percentiles

REPLICAS = 3
FEW, MANY = 4, 24
"""Clients: half of what serve.yaml wants one replica to have, and what three have."""
DELAYS = {"upscale_delay_s": 5.0, "downscale_delay_s": 15.0, "metrics_interval_s": 2.0, "look_back_period_s": 5.0}
_LONGEST = 300.0


class Scaling:
    """Clients that ask at once through ``url``, and how many replicas run meanwhile."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._started = time.monotonic()
        self.seen: list[dict[str, Any]] = []

    async def phase(self, name: str, clients: int, seconds: float, replicas: int) -> None:
        """Have that many clients ask until so many replicas run, and ``seconds`` longer."""
        phase: dict[str, Any] = {"name": name, "clients": clients, "requests": 0, "errors": {}, "replicas": []}
        self.seen.append(phase)
        times, errors, is_over = list[float](), Counter[str](), asyncio.Event()
        asking = [asyncio.create_task(self._ask(number, times, errors, is_over.is_set)) for number in range(clients)]
        until = time.monotonic() + _LONGEST
        while time.monotonic() < until:
            states = replica_states()
            if not phase["replicas"] or phase["replicas"][-1]["states"] != states:
                phase["replicas"].append({"second": round(time.monotonic() - self._started, 1), "states": states})
                typer.echo(f"{phase['replicas'][-1]['second']:6.1f} s, {name}: {states}")
            if states == {"RUNNING": replicas}:
                until = min(until, time.monotonic() + seconds)
            await asyncio.sleep(0.5)
        is_over.set()
        await asyncio.gather(*asking)
        phase |= {"requests": len(times), "errors": dict(errors), "seconds_p50_p90_p99": _spread(times)}
        typer.echo(f"{name}: {clients} clients, {len(times)} answers, errors {dict(errors)}, {_spread(times)} s")

    async def _ask(self, number: int, times: list[float], errors: Counter[str], is_over: Callable[[], bool]) -> None:
        [conversation] = make_conversations(number + 1)[number:]
        while not is_over():
            result = await conversation.ask(self._url, [], "fleet")
            if result.error is None:
                times.append(result.end - result.start)
            else:
                errors[result.error[:200]] += 1


def _spread(times: list[float]) -> list[float]:
    found = percentiles(times)
    return [round(one, 2) for one in (found.p50, found.p90, found.p99)]


async def measure() -> list[dict[str, Any]]:
    async with running_valkey() as (_, redis_url, directory):
        places = [new_replica(number, redis_url) for number in range(REPLICAS)]
        async with RayRouter(places, directory, redis_url, DELAYS).running() as url:
            scaling = Scaling(url)
            await scaling.phase("few", FEW, 20, 1)
            await scaling.phase("many", MANY, 30, REPLICAS)
            await scaling.phase("few again", FEW, 5, 1)
    return scaling.seen


def main(
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "fleet-autoscaling",
) -> None:
    """Exits with 1 if a request fails, or there were not one, three and one replicas."""
    phases = asyncio.run(measure())
    record = {"environment": environment(), "delays": DELAYS, "phases": phases}
    write_record(name, record)
    last = [phase["replicas"][-1]["states"] for phase in phases]
    is_right = last == [{"RUNNING": count} for count in (1, REPLICAS, 1)]
    raise typer.Exit(1 if any(phase["errors"] for phase in phases) or not is_right else 0)


if __name__ == "__main__":
    typer.run(main)
