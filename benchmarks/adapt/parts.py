"""The parts of ``benchmarks.adapt``: who asks what in which order, when a side may learn and when it may not.

While held-out prompts are asked, every adapter is frozen: the worker neither trains nor takes in what it reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, cycle, islice

from benchmarks.adapt.record import HELD_OUT, RETURN, STREAM, Plan, Prompts, Record
from benchmarks.adapt.server import ENGINE, WORKER, Server, forget_peak, memory
from benchmarks.common.load import run_load
from benchmarks.common.process import NoiseMeter
from benchmarks.common.time_limit import bounded
from benchmarks.prompts.build import Prompt

STREAM_SHARE = 0.75
"""Of a part's time, for all streams together."""
SWITCH_TENANT, LOAD_TENANT = "switch", "load"
_STATE_SECONDS = 5.0
_WAVES = 2
"""Of a run of part ``load``: requests for each stream of it."""
_LEFT = 3600.0


async def gain(plan: Plan, prompts: Prompts, servers: Sequence[Server], record: Record) -> None:
    """A stream of the plan's only domain, then held-out prompts by all sides in turn."""
    (domain,) = plan.domains
    each = STREAM_SHARE * plan.seconds / max(1, len(_learning(servers)))
    for server in _learning(servers):
        started = time.monotonic()
        await _stream(server, domain, prompts.stream[domain], each, plan, record)
        if server.side.aligns and plan.rest:
            await asyncio.sleep(plan.rest)
            record.state(server, domain, time.monotonic() - started)
        await _freeze([server], [domain])
    left = (1 - STREAM_SHARE) * plan.seconds
    await _held_out(servers, {domain: domain}, HELD_OUT, prompts, plan, record, left)


async def switch(plan: Plan, prompts: Prompts, servers: Sequence[Server], record: Record) -> None:
    """One tenant: a topic, its held-out prompts, another topic, the same held-out prompts of the first again."""
    first, second = plan.domains[:2]
    each = STREAM_SHARE * plan.seconds / max(1, 2 * len(_learning(servers)))
    for server in _learning(servers):
        await _stream(server, SWITCH_TENANT, prompts.stream[first], each, plan, record)
        await _freeze([server], [SWITCH_TENANT])
    of_first, of_second = {first: SWITCH_TENANT}, {second: SWITCH_TENANT}
    await _held_out(servers, of_first, HELD_OUT, prompts, plan, record, _LEFT)
    for server in _learning(servers):
        if server.side.aligns:
            await server.unfreeze([SWITCH_TENANT])
        await _stream(server, SWITCH_TENANT, prompts.stream[second], each, plan, record)
        await _freeze([server], [SWITCH_TENANT])
    await _held_out(servers, of_first, RETURN, prompts, plan, record, _LEFT)
    await _held_out(servers, of_second, HELD_OUT, prompts, plan, record, _LEFT)


async def tenants(plan: Plan, prompts: Prompts, servers: Sequence[Server], record: Record) -> None:
    """Two tenants with a domain each, at once; then the held-out prompts of each."""
    deadline = time.monotonic() + plan.seconds
    names = plan.domains[:2]
    each = STREAM_SHARE * plan.seconds / max(1, len(_learning(servers)))
    for server in _learning(servers):
        streams = (_stream(server, name, prompts.stream[name], each, plan, record) for name in names)
        await asyncio.gather(*streams)
        await _freeze([server], names)
    of_domains = {name: name for name in names}
    await _held_out(servers, of_domains, HELD_OUT, prompts, plan, record, deadline - time.monotonic())


async def peaks(plan: Plan, prompts: Prompts, servers: Sequence[Server], record: Record) -> None:
    """Memory of engine and worker: once they are ready, and at most in a stream."""
    each = STREAM_SHARE * plan.seconds / len(servers)
    domain = plan.domains[0]
    for server in servers:
        engine, worker = server.child(ENGINE), server.child(WORKER)
        if engine is None or (server.side.aligns and worker is None):
            raise RuntimeError(f"{server.side.name}: engine or worker is not running")
        await _wait_for_worker(server, domain)
        processes = {name: process for name, process in (("engine", engine), ("worker", worker)) if process}
        ready = {name: memory(process) for name, process in processes.items()}
        for process in processes.values():
            forget_peak(process)
        await _stream(server, domain, prompts.stream[domain], each, plan, record)
        most = {f"{name}_most": memory(process)[1] for name, process in processes.items()}
        at_first = {f"{name}_ready": now for name, (now, _) in ready.items()}
        loading = {f"{name}_loading": peak for name, (_, peak) in ready.items()}
        record.run(side=server.side.name, **at_first, **loading, **most)
        record.save()


async def _wait_for_worker(server: Server, tenant: str) -> None:
    """Until it has loaded its model parts. ``tenant``: one that has asked something."""
    if server.side.aligns:
        await server.freeze([tenant])
        await server.unfreeze([tenant])


async def load(plan: Plan, prompts: Prompts, servers: Sequence[Server], record: Record) -> None:
    """Throughput and latency of each side under the same load, in interleaved rounds; all domains mixed."""
    mixed = list(chain.from_iterable(zip(*(prompts.stream[domain] for domain in plan.domains), strict=False)))
    count = _WAVES * plan.concurrency
    for server in servers:
        await _wait_for_worker(server, plan.domains[0])
    for number in bounded(range(plan.first_round, plan.first_round + plan.rounds), plan.seconds):
        chosen = list(islice(cycle(mixed), number * count, (number + 1) * count))
        for server in servers if number % 2 == 0 else reversed(servers):
            await _load_run(server, chosen, number, plan, record)
        record.save()


async def _load_run(server: Server, prompts: Sequence[Prompt], number: int, plan: Plan, record: Record) -> None:
    worker, noise = server.child(WORKER), NoiseMeter(server.process)
    used = sum(worker.cpu_times()[:2]) if worker else 0.0
    options = server.load_options(LOAD_TENANT, plan.concurrency, len(prompts), plan.max_tokens)
    report, _ = await run_load(options, [prompt.messages for prompt in prompts])
    if report.errors:
        raise RuntimeError(f"{server.side.name}: {report.error_messages}")
    used = sum(worker.cpu_times()[:2]) - used if worker else 0.0
    record.run(
        side=server.side.name,
        round=number,
        tokens=report.output_tokens,
        tokens_per_second=report.tokens_per_second,
        itl_p50=report.itl.p50,
        itl_p99=report.itl.p99,
        worker_cores=used / report.seconds,
        updates=server.adapter(LOAD_TENANT)["num_updates"] if server.side.aligns else 0,
        noise=noise.read(),
    )


async def _stream(
    server: Server, tenant: str, prompts: Sequence[Prompt], seconds: float, plan: Plan, record: Record
) -> None:
    """Clients that ask, read, pause, and ask again, each the next prompt."""
    started, told, tokens = time.monotonic(), 0.0, 0
    waiting = cycle(prompts)

    async def client() -> None:
        nonlocal told, tokens
        while (at := time.monotonic() - started) < seconds and (plan.tokens is None or tokens < plan.tokens):
            answer = await server.ask(next(waiting), tenant, plan.max_tokens)
            tokens += answer.tokens
            record.answer(server, STREAM, replace(answer, at=at))
            if server.side.aligns and at - told >= _STATE_SECONDS:
                told = at
                record.state(server, tenant, at)
            await asyncio.sleep(plan.pause * answer.seconds)

    await asyncio.gather(*(client() for _ in range(plan.clients)))
    if server.side.aligns:
        record.state(server, tenant, time.monotonic() - started)
    record.save()


def _learning(servers: Sequence[Server]) -> list[Server]:
    return [server for server in servers if server.side.aligns or server.side.follows_sessions]


async def _freeze(servers: Sequence[Server], names: Sequence[str]) -> None:
    for server in servers:
        if server.side.aligns:
            await server.freeze(names)


async def _held_out(
    servers: Sequence[Server],
    tenants: Mapping[str, str],
    phase: str,
    prompts: Prompts,
    plan: Plan,
    record: Record,
    seconds: float,
) -> None:
    """Every prompt by all sides in turn, the other way round every other time; a round has a prompt of each domain.

    Args:
        servers: whose adapters are frozen.
        tenants: who asks, by domain.
        phase: of the record.
        prompts, plan, record: as in the parts.
        seconds: at most so long.
    """
    rounds = list(zip(*(prompts.held_out[domain][: plan.prompts] for domain in tenants), strict=False))
    for number, asked in enumerate(bounded(rounds, seconds)):
        for prompt in asked:
            for server in servers if number % 2 == 0 else reversed(servers):
                answer = await server.ask(prompt, tenants[prompt.domain], plan.max_tokens)
                record.answer(server, phase, answer)
        record.save()


Part = Callable[[Plan, Prompts, Sequence[Server], Record], Awaitable[None]]
PARTS: dict[str, Part] = {"gain": gain, "switch": switch, "tenants": tenants, "memory": peaks, "load": load}
