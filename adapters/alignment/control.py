"""The worker's end of ``engine.online.adapter_control``: commands in, state out. Redis may be down at any time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

import msgspec
import structlog

from evospec.engine.online.adapter_control import (
    AdapterCommand,
    AdapterStatus,
    WorkerStatus,
    commands_key,
    encode_status,
    status_key,
)
from evospec.engine.redis_clients import REDIS_FAILURES, connect

log = structlog.get_logger(__name__)

_TIMEOUT = 2.0


class ControlChannel:
    """Commands of operators, and what they are shown.

    Args:
        url: of Redis or Valkey.
        stream: key of the token log.
    """

    def __init__(self, url: str, stream: str) -> None:
        self._redis = connect(url, _TIMEOUT)
        self._commands, self._status = commands_key(stream), status_key(stream)

    def take(self) -> AdapterCommand | None:
        """The oldest command, which is not given again; None where there is none, and while Redis is down."""
        with suppress(*REDIS_FAILURES):
            while (data := self._redis.lpop(self._commands)) is not None:
                try:
                    return msgspec.msgpack.decode(data, type=AdapterCommand)  # type: ignore[arg-type]
                except msgspec.MsgspecError as error:
                    log.warning("a command could not be read", error=str(error))
        return None

    def give_back(self, command: AdapterCommand) -> None:
        """Have a command that could not be carried out come first again."""
        try:
            self._redis.lpush(self._commands, msgspec.msgpack.encode(command))
        except REDIS_FAILURES as error:
            log.error("an adapter command is lost", key=command.key, action=command.action, reason=str(error))

    def report(self, worker: WorkerStatus, adapters: Mapping[str, AdapterStatus]) -> None:
        """Replace what is shown; nothing changes while Redis is down."""
        with suppress(*REDIS_FAILURES), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(self._status)
            pipeline.hset(self._status, mapping=encode_status(worker, adapters))  # type: ignore[arg-type]
            pipeline.execute()

    def now(self) -> float:
        """Seconds of the epoch, by the clock of Redis; by this machine's while Redis is down."""
        try:
            seconds, microseconds = self._redis.time()
        except REDIS_FAILURES:
            return time.time()
        return seconds + microseconds / 1e6

    def close(self) -> None:
        """Close the connection; what is shown stays, and grows old."""
        self._redis.close()
