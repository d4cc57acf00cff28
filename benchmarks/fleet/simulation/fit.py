"""What the model knows of a server, fitted to one replica alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.fleet.processes import TENANTS
from benchmarks.fleet.simulation.figures import figures, redis_figures
from benchmarks.fleet.simulation.fleet import Fleet, Served
from benchmarks.fleet.simulation.measure import RealFleet
from benchmarks.fleet.simulation.replica import Costs
from benchmarks.fleet.simulation.ring import Ring
from benchmarks.fleet.simulation.traces import Conversation, Scale

_PROMPTS, _EACH = (32, 256, 512, 1024, 2048), 4
_STREAMS, _STREAMED = (1, 8), 160
_IDLE_SECONDS = 10.0
_CORES = 2
_CHUNK = 512
"""Tokens of a prompt that one step reads."""


async def probe(fleet: RealFleet) -> Costs:
    """What single requests cost: prompts of some lengths, answers one and eight at a time, and nothing at all."""
    costs = Costs(**fleet.step_costs())
    before = fleet.cpu()
    await asyncio.sleep(_IDLE_SECONDS)
    idle = (fleet.cpu() - before) / _IDLE_SECONDS
    await _streams(fleet, 1)  # warms up
    rows, engine, waits = [], [], []
    for length in _PROMPTS:
        start = await fleet.counters()
        results = [await _ask(fleet, 31 * number + length, length, 1) for number in range(_EACH)]
        seconds = (await fleet.counters()).step_seconds - start.step_seconds
        rows.append([-(-length // _CHUNK), length])
        engine.append(seconds / _EACH)
        waits.append(min(results) - seconds / _EACH)
    (_, prompt_token), *_ = np.linalg.lstsq(np.array(rows, float), np.array(engine), rcond=None)
    step_seconds, fronts = [], []
    for streams in _STREAMS:
        start, before, began = await fleet.counters(), fleet.cpu(), time.perf_counter()
        await _streams(fleet, streams)
        front = fleet.cpu() - before - idle * (time.perf_counter() - began)
        after = await fleet.counters()
        step_seconds.append((after.step_seconds - start.step_seconds) / (after.steps - start.steps))
        fronts.append(front[1] / (streams * _STREAMED))
    verify = costs.curves().verify
    beside = [seconds - verify(streams) for seconds, streams in zip(step_seconds, _STREAMS, strict=True)]
    sequence = (beside[1] - beside[0]) / (_STREAMS[1] - _STREAMS[0])
    event = float(fronts[1])
    return replace(
        costs,
        prompt_token=float(prompt_token),
        sequence=sequence,
        step=beside[0] - sequence,
        event=event,
        request=max(float(np.median(waits)) - event, 0.0),
        idle=float(idle.sum()),
    )


async def _ask(fleet: RealFleet, place: int, length: int, max_tokens: int, **more: int) -> float:
    """Seconds to the first token of an answer to a prompt that no cache has."""
    prompt = fleet.text(1009 * place, length)
    result, _ = await fleet.ask(prompt, max_tokens, TENANTS[0], {"x-session-id": f"probe-{place}-{length}"}, **more)
    return result.token_times[0] - result.start


async def _streams(fleet: RealFleet, count: int) -> None:
    """Answers without drafts, so many at a time."""
    asked = (_ask(fleet, 50 * count + number, 16, _STREAMED, num_speculative_tokens=0) for number in range(count))
    await asyncio.gather(*asked)


@dataclass(frozen=True)
class Run:
    """Real replicas that were told conversations, and what they did. ``cpu``: as in ``RealFleet.cpu``."""

    conversations: Sequence[Conversation]
    seconds: float
    scale: Scale
    addresses: Sequence[str]
    num_blocks: int
    served: list[Served]
    cpu: list[float]
    redis_calls: dict[str, int]
    redis_call_seconds: float
    redis_bytes: list[int]
    snapshots: dict[str, int]
    others: float
    """Cores that other programs took."""
    step_costs: dict[str, Any]

    def simulate(self, costs: Costs) -> Fleet:
        """The same in the model, on what the others left of two cores."""
        machines, router = [0] * len(self.addresses), Ring(self.addresses)
        fleet = Fleet(costs, self.num_blocks, router, machines, _CORES - self.others, self.scale)
        fleet.run(self.conversations, self.seconds, TENANTS)
        return fleet

    def measured(self) -> dict[str, float]:
        """Its figures."""
        count = len(self.served)
        return figures(self.served, self.seconds) | {
            "redis_calls": sum(self.redis_calls.values()) / count,
            **{f"redis_{way}": size / count for way, size in zip(("in", "out"), self.redis_bytes, strict=True)},
            "core_seconds_a_request": sum(self.cpu) / count,
        }

    def simulated(self, costs: Costs) -> dict[str, float]:
        """The model's figures of it, by the step costs that these replicas measured at their starts."""
        costs = replace(costs, **self.step_costs)
        fleet = self.simulate(costs)
        used = sum(fleet.machines[0].busy.values()) + costs.idle * len(self.addresses) * self.seconds
        return figures(fleet.served, self.seconds) | {
            **redis_figures(fleet.served, costs),
            "core_seconds_a_request": used / len(fleet.served),
        }


async def run(fleet: RealFleet, conversations: Sequence[Conversation], seconds: float, scale: Scale) -> Run:
    """Tell real replicas these conversations."""
    start, cpu, meter = await fleet.counters(), fleet.cpu(), fleet.meter()
    served = await fleet.replay(conversations, seconds, scale)
    used, others = fleet.cpu() - cpu, meter.read() / 100 * _CORES
    end = await fleet.counters()
    calls = {name: number - start.redis_calls.get(name, 0) for name, number in end.redis_calls.items()}
    return Run(
        conversations,
        seconds,
        scale,
        fleet.addresses,
        int(end.num_blocks),
        served,
        used.tolist(),
        {name: number for name, number in calls.items() if number and name != "info"},
        (end.redis_seconds - start.redis_seconds) / sum(calls.values()),
        [end.redis_in - start.redis_in, end.redis_out - start.redis_out],
        await fleet.snapshots(conversations),
        others,
        fleet.step_costs(),
    )


def fit(costs: Costs, one: Run) -> Costs:
    """The rest, from conversations with one replica."""
    costs = replace(costs, **one.step_costs)
    wanted, low, high = figures(one.served, one.seconds)["tokens_per_event"], 0.0, 0.95
    for _ in range(7):
        costs = replace(costs, acceptance=(low + high) / 2)
        found = figures(one.simulate(costs).served, one.seconds)["tokens_per_event"]
        low, high = (costs.acceptance, high) if found < wanted else (low, costs.acceptance)
    requests, events = len(one.served), sum(served.events for served in one.served)
    engine, front = one.cpu
    costs = replace(costs, engine=engine / one.simulate(costs).machines[0].busy[False])
    closing = (front - costs.idle * one.seconds - costs.event * events) / requests - costs.request
    length = {served.session: served.prompt_tokens + served.output_tokens for served in one.served}
    points = [(length[name], size) for name, size in one.snapshots.items() if name in length]
    each, base = np.polyfit(*np.array(points, float).T, 1)
    costs = replace(costs, closing=max(closing, 0.0), snapshot=(float(base), float(each)), redis=(0.0, 0.0))
    without = redis_figures(one.served, costs)
    beside = [
        size / requests - without[way] for size, way in zip(one.redis_bytes, ("redis_in", "redis_out"), strict=True)
    ]
    return replace(costs, redis=(beside[0], beside[1]))
