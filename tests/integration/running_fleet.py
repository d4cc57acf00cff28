"""Two replicas behind a real router, with engines that follow scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.common.process import free_port
from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from tests.integration.running_api import TEXT, Api, running_api
from tests.integration.scripted_engine import Script

RouterCommand = Callable[[int, Sequence[int], Path], list[str]]
"""How to start a router on a port, with replicas by their ports and a directory for its files."""


@dataclass
class Fleet:
    """``client`` talks to the router."""

    client: httpx.AsyncClient
    replicas: list[Api]

    async def complete(self, headers: dict[str, str] | None = None) -> httpx.Response:
        return await self.client.post("/v1/completions", json=TEXT, headers=headers)

    async def replica_of(self, headers: dict[str, str] | None = None) -> int:
        """Which replica answers such a request."""
        before = self.num_requests()
        response = await self.complete(headers)
        assert response.status_code == 200, response.text
        [index] = [index for index, count in enumerate(self.num_requests()) if count > before[index]]
        return index

    async def until_status(self, status: int) -> httpx.Response:
        """The first answer of that status: routers look once in a second."""
        async with asyncio.timeout(20):
            while True:
                if (response := await self.complete()).status_code == status:
                    return response

    async def asked(self) -> tuple[Api, Api]:
        """The replica that has the one request, and the other."""
        first, second = self.replicas
        await first.until(lambda: sum(self.num_requests()))
        return (first, second) if first.engine.requests else (second, first)

    def num_requests(self) -> list[int]:
        return [len(replica.engine.requests) for replica in self.replicas]


@asynccontextmanager
async def running_fleet(
    script: Script,
    model: ModelFiles,
    tokenizer: Tokenizer,
    valkey_url: str,
    directory: Path,
    router: RouterCommand,
    health: str = "/health",
) -> AsyncIterator[Fleet]:
    """``health``: the router's path that is 200 once it runs."""
    async with AsyncExitStack() as stack:
        replicas = []
        for name in ("first", "second"):
            (directory / name).mkdir()
            api = running_api(script, model, tokenizer, valkey_url, directory / name)
            replicas.append(await stack.enter_async_context(api))
        ports = [replica.client.base_url.port or 0 for replica in replicas]
        client = await stack.enter_async_context(_running_router(ports, directory, router, health))
        yield Fleet(client, replicas)


@asynccontextmanager
async def _running_router(
    replicas: Sequence[int], directory: Path, router: RouterCommand, health: str
) -> AsyncIterator[httpx.AsyncClient]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(*router(port, replicas, directory))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            async with asyncio.timeout(60):
                while not await is_healthy(client, health):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def is_healthy(client: httpx.AsyncClient, path: str = "/health") -> bool:
    try:
        return (await client.get(path)).status_code == 200
    except httpx.TransportError:
        return False
