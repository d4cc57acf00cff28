"""The server's end of ``engine.online.adapter_control``: what the adapters worker reports, and commands for it."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import structlog

from evospec.engine.online.adapter_control import (
    AdapterCommand,
    AdapterStatus,
    WorkerStatus,
    commands_key,
    decode_status,
    learned_key,
    status_key,
)
from evospec.server.redis_gate import RedisGate, RedisUnavailable, needs_redis

log = structlog.get_logger(__name__)

_UNAVAILABLE = "Redis, through which the worker is reached, does not answer."


class AdapterControl:
    """Reaches the worker through the Redis of the token log, whose key is ``stream``."""

    def __init__(self, gate: RedisGate, stream: str) -> None:
        self._gate = gate
        self._commands, self._status = commands_key(stream), status_key(stream)

    async def status(self) -> tuple[WorkerStatus | None, dict[str, AdapterStatus]]:
        """What the worker reported last, None if none ever ran; raises 503 as ``ApiError`` while Redis is down."""
        with needs_redis(_UNAVAILABLE):
            fields = await self._gate.run(self._gate.redis.hgetall(self._status))
        try:
            return decode_status(fields)  # type: ignore[arg-type]  # bytes
        except msgspec.MsgspecError as error:  # a worker of another version
            log.warning("the worker's status could not be read", error=str(error))
            return None, {}

    async def others_have_learned(self, layout: str) -> bool:
        """Whether a server of this Redis has let others have adapters of this layout; False while Redis is down."""
        with suppress(RedisUnavailable):
            return bool(await self._gate.run(self._gate.redis.exists(learned_key(layout))))
        return False

    async def send(self, command: AdapterCommand) -> None:
        """Leave a command for the worker; raises 503 as ``ApiError`` while Redis is down."""
        with needs_redis(_UNAVAILABLE):
            await self._gate.run(self._gate.redis.rpush(self._commands, msgspec.msgpack.encode(command)))
        log.info("adapter command", action=command.action, key=command.key)
