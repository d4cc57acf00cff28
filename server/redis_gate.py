"""Redis that may be down: short waits, one log line per outage, no request held up by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog
from prometheus_client import Counter

from evospec.engine.redis_clients import REDIS_FAILURES, connect_async
from evospec.server.errors import ApiError
from evospec.server.options import RedisConfig

T = TypeVar("T")

log = structlog.get_logger(__name__)

REDIS_ERRORS = Counter("evospec:redis_errors", "Operations that Redis failed or did not answer in time.")
REDIS_SKIPPED = Counter("evospec:redis_skipped", "Operations not tried because Redis is known to be down.")
_MOST_AT_ONCE = 16
"""Operations sent at a time. Redis does one after the other anyway, and redis-py's pool fails the 101st."""
_STOOD_STILL = 1.5
"""A time-out that is noticed after so many times its length."""


class RedisUnavailable(Exception):
    """Redis did not answer in time, failed, or is known to be down."""


class RedisGate:
    """The only way to Redis on the request path.

    After a failure the gate is shut for ``retry_interval`` seconds: operations fail at once, and then a single
    one tries again. So an outage costs at most one waiting request per interval, and ``timeout`` seconds each.

        gate = RedisGate("redis://localhost", config)
        value = await gate.run(gate.redis.get("key"))
    """

    def __init__(self, url: str, config: RedisConfig) -> None:
        self.redis = connect_async(url, config.timeout)
        self._timeout = config.timeout
        self._retry_interval = config.retry_interval
        self._turns = asyncio.Semaphore(_MOST_AT_ONCE)
        self._is_down = self._stood_still = False
        self._retry_at = self._failed_at = 0.0

    async def run(self, operation: Awaitable[T]) -> T:
        """The result of ``operation``, or ``RedisUnavailable`` at most ``timeout`` seconds after its turn has come."""
        try:
            self._refuse_if_down()
            async with self._turns:  # outside the time-out: that many wait here says nothing about Redis
                self._refuse_if_down()
                return await self._try(operation)
        finally:
            _discard(operation)

    def _refuse_if_down(self) -> None:
        if self._is_down and time.monotonic() < self._retry_at:
            REDIS_SKIPPED.inc()
            raise RedisUnavailable

    async def _try(self, operation: Awaitable[T]) -> T:
        # During an outage a single operation tries; others must not wait for the same time-out.
        started = time.monotonic()
        self._retry_at = started + self._timeout
        try:
            async with asyncio.timeout(self._timeout):
                result = await operation
        except REDIS_FAILURES as error:
            self._note_failure(error, time.monotonic() - started)
            raise RedisUnavailable from error
        if started > self._failed_at:  # else its answer may have come before the outage
            self._note_success()
        return result

    async def close(self) -> None:
        await self.redis.aclose()

    def _note_failure(self, error: Exception, seconds: float) -> None:
        REDIS_ERRORS.inc()
        stood_still, self._stood_still = self._stood_still, seconds > _STOOD_STILL * self._timeout
        if self._stood_still and not stood_still:
            return  # this process stood still: once, that says nothing about Redis
        self._failed_at = time.monotonic()
        self._retry_at = self._failed_at + self._retry_interval
        if not self._is_down:
            self._is_down = True
            log.warning("redis is down", error=str(error) or type(error).__name__)

    def _note_success(self) -> None:
        self._stood_still = False
        if self._is_down:
            self._is_down = False
            log.info("redis is back")


@contextmanager
def needs_redis(message: str, code: str | None = None) -> Iterator[None]:
    """Turns an outage into a 503 that says ``message``."""
    try:
        yield
    except RedisUnavailable:
        raise ApiError(503, message, code=code, retry_after=1) from None


def _discard(operation: Awaitable[object]) -> None:
    """Spare Python the warning about a coroutine that was never awaited; nothing happens to one that was."""
    if asyncio.iscoroutine(operation):
        operation.close()
