"""Replicas behind a router, killed, updated and without their Valkey, while sessions talk: ``make fleet``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from redis.asyncio import Redis
from rich.console import Console

from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.fleet.conversations import Conversation, Traffic, make_conversations
from benchmarks.fleet.processes import Process, Router, new_replica, running_valkey
from benchmarks.fleet.report import acceptance, moves, phase_record, table
from evospec.server.bench.stream import StreamResult

ROUTERS = {"envoy": "benchmarks.fleet.envoy:EnvoyRouter", "ray": "benchmarks.fleet.ray_serve:RayRouter"}
"""Only those in use are imported."""
REPLICAS = 3
BAD = ("wrong", "failed", "sessions_lost")
"""What no phase may have."""
_AT_ONCE = 8
"""Conversations, where the time of an answer does not matter."""


async def compare_moves(
    conversations: Sequence[Conversation], replicas: Sequence[Process]
) -> tuple[dict[str, Any], list[list[str]]]:
    """Hold each conversation twice, as two tenants: at one replica, and at another replica every turn.

    Returns what is recorded of that, and the answers of each conversation.
    """
    urls = [replica.url or "" for replica in replicas]
    room = asyncio.Semaphore(_AT_ONCE)

    async def hold(number: int, step: int, key: str) -> list[StreamResult]:
        async with room:
            return await conversations[number].hold(lambda turn: urls[(number + step * turn) % len(urls)], key)

    numbers = range(len(conversations))
    stays = await asyncio.gather(*(hold(number, 0, "stays") for number in numbers))
    moved = await asyncio.gather(*(hold(number, 1, "moves") for number in numbers))
    pairs = [pair for a, b in zip(stays, moved, strict=True) for pair in zip(a, b, strict=True)]
    record = {
        "stays": acceptance([one for one, _ in pairs]),
        "moves": acceptance([other for _, other in pairs]),
        "answers": len(pairs),
        "different": sum(one.text != other.text for one, other in pairs),
    }
    return record, [[one.text for one in results] for results in stays]


async def restart(process: Process) -> None:
    await process.kill()
    await asyncio.sleep(2)
    await process.start()
    await asyncio.sleep(5)


async def hurt(router: Router, valkey: Process, traffic: Traffic, seconds: float, console: Console) -> dict[str, Any]:
    """All phases, one after the other, with ``seconds`` before and after them; what came of the requests of each."""
    phases = {}
    running = asyncio.create_task(traffic.run())

    async def phase(name: str, work: Awaitable[object]) -> None:
        before, started = len(traffic.finished), time.monotonic()
        await work
        if running.done():
            running.result()  # raises what ended it
        phases[name] = phase_record(traffic.finished[before:], time.monotonic() - started)
        counts = {kind: phases[name][kind] for kind in ("requests", "cut", *BAD)}
        console.print(f"[dim]{name}: {counts}, {phases[name]['errors']}[/dim]")

    try:
        await phase("before", asyncio.sleep(seconds))
        for number in range(REPLICAS):
            await phase(f"replica {number} killed", router.kill(number))
        await phase("rolling update", router.update())
        await phase("Valkey killed", restart(valkey))
        await phase("after", asyncio.sleep(seconds))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return phases


async def measure(
    routers: Sequence[str], sessions: int, seconds: float, console: Console
) -> AsyncIterator[dict[str, Any]]:
    """Start everything, measure behind one router after the other, stop everything; a record for each router."""
    async with AsyncExitStack() as stack:
        valkey, redis_url, directory = await stack.enter_async_context(running_valkey())
        replicas = [new_replica(number, redis_url) for number in range(REPLICAS)]
        for replica in replicas:
            stack.push_async_callback(replica.stop)
        await asyncio.gather(*(replica.start() for replica in replicas))
        conversations = make_conversations(sessions)
        console.print("[dim]sessions that stay, and that move[/dim]")
        moved, answers = await compare_moves(conversations, replicas)
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        for name in routers:
            console.print(f"[dim]{name}[/dim]")
            router: Router = resolve_name(ROUTERS[name])(replicas, directory, redis_url)
            async with router.running() as url:
                phases = await hurt(router, valkey, Traffic(url, conversations, answers, redis), seconds, console)
            plan = {"router": name, "replicas": REPLICAS, "sessions": sessions}
            yield {"plan": plan, "environment": environment(), "moves": moved, "phases": phases}


async def keep(records: AsyncIterator[dict[str, Any]], console: Console) -> bool:
    """Write each record and print it; whether all answers were right, and no session or request was lost."""
    is_good = True
    async for record in records:
        path = RESULTS / f"fleet-{record['plan']['router']}.json"
        path.write_text(json.dumps(record, indent=1))
        for line in (table(record), moves(record), str(path)):
            console.print(line)
        is_good &= not record["moves"]["different"]
        is_good &= not any(phase[kind] for phase in record["phases"].values() for kind in BAD)
    return is_good


def main(
    router: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(ROUTERS)}; repeatable; default: one after the other.")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, help="That talk at once.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="Without faults, before and after them.")] = 45.0,
) -> None:
    """Exits with 1 if an answer is wrong, a session is lost, or a request fails that had not begun."""
    if unknown := set(router or ()) - set(ROUTERS):
        raise typer.BadParameter(f"no such router: {', '.join(unknown)}", param_hint="--router")
    console = Console(width=180)
    asked = [name for name in ROUTERS if router is None or name in router]  # Ray comes last: it ends the replicas
    is_good = asyncio.run(keep(measure(asked, sessions, seconds, console), console))
    raise typer.Exit(0 if is_good else 1)


if __name__ == "__main__":
    typer.run(main)
