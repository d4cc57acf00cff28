"""Real fleets beside the model of them, and what the model knows of a server, fitted to one replica alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.fleet.processes import TENANTS
from benchmarks.fleet.simulation.figures import figures, redis_figures, texts
from benchmarks.fleet.simulation.fleet import Fleet, Served
from benchmarks.fleet.simulation.measure import RealFleet
from benchmarks.fleet.simulation.replica import FIRST_TOKENS, Costs, num_pairs
from benchmarks.fleet.simulation.ring import Ring
from benchmarks.fleet.simulation.traces import Conversation, Scale, make_conversations
from evospec.kernels.native import has_amx

_RATE = 0.3
"""Conversations that begin a second, at one replica, and at two or more times two: they share two cores."""
_SECONDS = 300.0
_SCALE = Scale(pause=10.0)
_PROMPTS, _EACH = (32, 256, 512, 1024, 2048), 4
_STREAMS, _STREAMED = (1, 8), 160
_IDLE_SECONDS = 10.0
_CORES = 2
_STEP_SECONDS = "evospec:engine_step_seconds_sum"
_TURNS = 2
"""In which prompts, what drafts are worth, and the time of steps are fitted, since each changes the others."""
_HALVINGS = 8
"""Of the range in which a number is looked for."""
_FEW = 8
"""Tokens of an answer that says little of how easy its conversation is to draft for."""
_CHUNK = 512
"""Tokens of a prompt that one step reads."""
_TOLD_WITHIN = 3.0
"""Seconds until an engine's steps are in its server's counters."""


@dataclass(frozen=True)
class Run:
    """Real replicas that were told conversations, and what they did. ``cpu``: as in ``RealFleet.cpu``."""

    addresses: list[str]
    num_blocks: int
    served: list[Served]
    cpu: list[float]
    redis: dict[str, float]
    """Its commands, their seconds, and bytes to and from it."""
    snapshots: dict[str, int]
    others: float
    """Cores that other programs took."""
    step_costs: dict[str, Any]

    def measured(self) -> dict[str, float]:
        whole = {name: self.redis[name] for name in ("redis_calls", "redis_in", "redis_out")}
        whole["core_seconds"] = sum(self.cpu)
        return figures(self.served) | {name: number / len(self.served) for name, number in whole.items()}

    def simulate(self, costs: Costs) -> Fleet:
        """The same in the model, on what the others left of two cores.

        How easy each answer is to draft for is a matter of its text, and taken from the run as its length is.
        """
        machines, router = [0] * len(self.addresses), Ring(self.addresses)
        accepted = {one.name: one.accepted for one in self.served}
        fleet = Fleet(costs, self.num_blocks, router, machines, _CORES - self.others, _SCALE, accepted)
        fleet.run(_conversations(len(machines)), TENANTS)
        return fleet

    def simulated(self, costs: Costs) -> dict[str, float]:
        fleet = self.simulate(costs)
        idle = costs.idle * len(self.addresses) * max(one.end for one in fleet.served)
        work = (sum(fleet.machines[0].busy.values()) + idle) / len(fleet.served)
        return figures(fleet.served) | redis_figures(fleet.served, costs) | {"core_seconds": work}

    def as_it_was(self, costs: Costs) -> Costs:
        """The costs of its replicas at that time, and what drafts for its texts were worth."""
        costs = replace(costs, **self.step_costs)
        for _ in range(_TURNS):
            costs = _with_engine(_with_acceptance(_with_prompts(costs, self), self), self)
        return costs


def _conversations(count: int) -> list[Conversation]:
    """What so many replicas are told, and no other number of them."""
    return make_conversations(_RATE * min(count, _CORES), _SECONDS, _SCALE, seed=count)


async def run(fleet: RealFleet) -> Run:
    conversations = _conversations(len(fleet.replicas))
    first, start = await fleet.counters(), await fleet.counters()
    cpu, meter = fleet.cpu(), fleet.meter()
    served = await fleet.replay(conversations, _SCALE)
    used, others = fleet.cpu() - cpu, meter.read() / 100 * _CORES
    end = await fleet.counters()
    done = _difference(_difference(end, start), _difference(start, first))  # without what counting itself takes
    return Run(
        addresses=fleet.addresses,
        num_blocks=int(end["evospec:kv_blocks_total"]) // len(fleet.replicas),
        served=served,
        cpu=used.tolist(),
        redis={name: number for name, number in done.items() if name.startswith("redis_")},
        snapshots=await fleet.snapshots(conversations),
        others=others,
        step_costs=fleet.step_costs(),
    )


def _difference(end: dict[str, float], start: dict[str, float]) -> dict[str, float]:
    return {name: number - start.get(name, 0.0) for name, number in end.items()}


async def probe(fleet: RealFleet) -> Costs:
    """What single requests cost: nothing at all, answers one and eight at a time, and prompts of some lengths."""
    costs = Costs(**fleet.step_costs(), reads_prompts_apart=has_amx())
    before = fleet.cpu()
    await asyncio.sleep(_IDLE_SECONDS)
    costs = replace(costs, idle=float((fleet.cpu() - before).sum()) / _IDLE_SECONDS)
    await _streams(fleet, 1)  # warms up
    beside, event = [], 0.0
    for streams in _STREAMS:
        start, cpu = await fleet.counters(), fleet.cpu()
        await _streams(fleet, streams)
        event, end = float((fleet.cpu() - cpu)[1]) / (streams * _STREAMED), await fleet.counters()
        done = _difference(end, start)
        beside.append(done[_STEP_SECONDS] / done["evospec:engine_step_seconds_count"] - costs.curves.verify(streams))
    sequence = max(beside[1] - beside[0], 0.0) / (_STREAMS[1] - _STREAMS[0])
    costs = replace(costs, step=beside[0] - sequence, sequence=sequence, event=event)
    waits = []
    for length in _PROMPTS:
        start = await _settled(fleet)
        found = [await _ask(fleet, 31 * number + length, length, 1) for number in range(_EACH)]
        seconds = _difference(await _settled(fleet), start)[_STEP_SECONDS] / _EACH
        waits.append(float(np.mean(found)) - seconds)
    return replace(costs, request=max(float(np.median(waits)) - event, 0.0))


async def _settled(fleet: RealFleet) -> dict[str, float]:
    """The counters, when they know of all steps."""
    await asyncio.sleep(_TOLD_WITHIN)
    return await fleet.counters()


async def _ask(fleet: RealFleet, place: int, length: int, max_tokens: int, **more: int) -> float:
    """Seconds to the first token of an answer to a prompt that no cache has."""
    prompt = fleet.text(1009 * place, length)
    result, _ = await fleet.ask(prompt, max_tokens, TENANTS[0], {"x-session-id": f"probe-{place}-{length}"}, **more)
    return result.token_times[0] - result.start


async def _streams(fleet: RealFleet, count: int) -> None:
    """Answers without drafts, so many at a time."""
    asked = (_ask(fleet, 50 * count + number, 16, _STREAMED, num_speculative_tokens=0) for number in range(count))
    await asyncio.gather(*asked)


def fit(probed: Costs, one: Run) -> Costs:
    """The rest, from conversations with one replica: what prompts cost, what drafts are worth, and all that is left."""
    costs, measured = one.as_it_was(probed), one.measured()
    fleet = one.simulate(costs)
    beside = sum(one.cpu) - costs.idle * measured["seconds"] - fleet.machines[0].busy[True]
    requests, events = len(one.served), sum(served.events for served in one.served)
    text = dict(texts(one.served))  # at the end of each session
    names = [name for name in one.snapshots if name in text]
    roots = np.sqrt([one.snapshots[name] for name in names])  # each size is about so far from any line
    snapshot = np.linalg.lstsq(np.array([text[name] for name in names]) / roots[:, None], roots, rcond=None)[0]
    costs = replace(
        costs,
        closing=max((beside - costs.event * events) / requests - costs.request, 0.0),
        snapshot=tuple(snapshot.tolist()),
        redis=(0.0, 0.0),
    )
    without = redis_figures(one.served, costs)
    to_redis, from_redis = (measured[way] - without[way] for way in ("redis_in", "redis_out"))
    return replace(costs, redis=(to_redis, from_redis))


def _with_prompts(costs: Costs, one: Run) -> Costs:
    """What reading a prompt takes, from the requests that were alone until their first token."""
    rows, seconds = [], []
    for asked in one.served:
        if any(other is not asked and asked.overlaps(other) for other in one.served):
            continue
        count = asked.prompt_tokens - asked.cached_tokens
        whole, rest = divmod(count, _CHUNK)
        first = whole * FIRST_TOKENS + min(rest, FIRST_TOKENS)
        rows.append([whole + (rest > 0), count, first, num_pairs(asked.cached_tokens, count)])
        seconds.append(asked.first_token - asked.start - costs.request - costs.event)
    # Of relative errors, or the longest prompt would decide all; and half of the requests take longer, half shorter.
    relative = np.array(rows, float) / np.array(seconds)[:, None]
    fitted = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)[0]
    step, token, first, pair = (fitted / np.median(relative @ fitted)).tolist()
    return replace(
        costs, prompt_step=step - costs.step_seconds(0, 1), prompt_token=token, prompt_first=first, prompt_pair=pair
    )


def _with_acceptance(costs: Costs, one: Run) -> Costs:
    """As different as answers were, and such that a part of an answer has as many tokens as there."""
    accepted = tuple(sorted(asked.accepted for asked in one.served if asked.output_tokens > _FEW))
    costs, wanted = replace(costs, accepted=accepted), figures(one.served)["tokens_per_event"]

    def accepts_much(power: float) -> bool:
        return figures(one.simulate(replace(costs, power=power)).served)["tokens_per_event"] >= wanted

    return replace(costs, power=_halved(0.0, 2.0, accepts_much))


def _halved(low: float, high: float, is_low: Callable[[float], bool]) -> float:
    """The number up to which ``is_low`` is true, by halving what it lies in."""
    middle = low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return middle


def _with_engine(costs: Costs, one: Run) -> Costs:
    """Such that engines compute for as long: serving, steps take longer than alone, and machines change their speed."""

    def is_fast(factor: float) -> bool:
        return one.simulate(replace(costs, engine=factor)).machines[0].busy[True] < one.cpu[0]

    return replace(costs, engine=_halved(0.2, 4.0, is_fast))
