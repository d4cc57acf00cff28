"""Rate limits of tenants: a token bucket for requests and one for tokens, in Redis and in this process."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from prometheus_client import Counter

from evospec.server.errors import ApiError, bad_request
from evospec.server.middleware import more_headers
from evospec.server.redis_gate import RedisGate, RedisUnavailable
from evospec.server.shielded import ShieldedTasks
from evospec.server.tenants import Tenant

RATE_LIMITED = Counter("evospec:rate_limited", "Requests refused with 429.", ["limit"])
for _limit in ("requests", "tokens"):
    RATE_LIMITED.labels(_limit)  # shown as 0 from the start

Limit = Literal["requests", "tokens"]
_MINUTE = 60.0
LIMIT_HEADERS = [
    f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")
]
"""OpenAI's, by which clients pace themselves."""


@dataclass(frozen=True)
class Charge:
    """What a request was charged at admission. ``tokens`` is 0 if nothing was taken from a bucket."""

    tenant: Tenant
    tokens: int
    is_in_redis: bool = False


class TokenBuckets:
    """A bucket for requests and one for tokens of each tenant that has such limits.

    A bucket holds a minute's worth, is full at first and refills steadily. ``clock``: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, Limit], tuple[float, float]] = {}
        """Level of each bucket, and when it had it; as many as there are tenants in the keys file, twice."""

    def take(self, tenant: Tenant, requests: int, tokens: int) -> tuple[Limit | None, float]:
        """Take from both buckets, or from neither; a negative number gives back, and never more than fits.

        Returns the limit for which there is too little (None: all was taken), and the seconds until there is enough.
        """
        now = self._clock()
        levels: dict[tuple[str, Limit], tuple[float, float]] = {}
        lacking: Limit | None = None
        wait = 0.0
        for limit, capacity in _capacities(tenant).items():
            cost = requests if limit == "requests" else tokens
            level = min(capacity, self._level(tenant, limit, capacity, now) - cost)
            if cost > 0 and level < 0 and -level * _MINUTE / capacity > wait:
                lacking, wait = limit, -level * _MINUTE / capacity
            levels[tenant.name, limit] = (level, now)
        if lacking is None:
            self._levels |= levels
        return lacking, math.ceil(wait * 1000) / 1000

    def left(self, tenant: Tenant) -> dict[Limit, float]:
        """What the tenant's buckets hold."""
        now = self._clock()
        return {limit: self._level(tenant, limit, size, now) for limit, size in _capacities(tenant).items()}

    def _level(self, tenant: Tenant, limit: Limit, capacity: int, now: float) -> float:
        level, since = self._levels.get((tenant.name, limit), (capacity, now))
        return min(capacity, level + (now - since) * capacity / _MINUTE)


def _capacities(tenant: Tenant) -> dict[Limit, int]:
    sizes: dict[Limit, int | None] = {"requests": tenant.requests_per_minute, "tokens": tenant.tokens_per_minute}
    return {limit: size for limit, size in sizes.items() if size is not None}


class RateLimiter:
    """Admits requests while their tenant's buckets hold enough, those of this process and those in Redis.

    A bucket holds at most one minute's worth and refills steadily, so a tenant may burst up to its limit. The buckets
    in Redis bound what all servers admit together. Those of this process cost nothing to ask, so they are asked first;
    they decide alone while Redis is down or slow, unless limits fail closed.

        await limiter.admit(tenant, 0)
        ...  # tokenise
        charge = await limiter.admit(tenant, prompt_tokens + max_tokens, requests=0)
        ...
        await limiter.settle(charge, tokens_used)
    """

    # Takes from both buckets, or from neither. Time is Redis's own, so that all servers agree.
    #
    # KEYS[1] - hash of the request bucket: level, time of the level in microseconds
    # KEYS[2] - hash of the token bucket, the same
    # ARGV[1] - requests a minute (capacity of the request bucket), 0: no limit
    # ARGV[2] - tokens a minute (capacity of the token bucket), 0: no limit
    # ARGV[3] - requests to take
    # ARGV[4] - tokens to take; negative: give back
    #
    # return {bucket that lacks (0: none, all taken; 1: requests; 2: tokens), milliseconds until it has enough,
    #         requests left if that is or were taken, tokens left, the same}
    LUA_TAKE_SCRIPT = """
        local time = redis.call('TIME')
        local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
        local levels = {}
        local lacking, wait = 0, 0
        for i = 1, 2 do
            local capacity, cost = tonumber(ARGV[i]), tonumber(ARGV[i + 2])
            if capacity > 0 then
                local state = redis.call('HMGET', KEYS[i], 'level', 'time')
                local level = tonumber(state[1]) or capacity
                local elapsed = math.max(0, now - (tonumber(state[2]) or now))
                level = math.min(capacity, level + elapsed * capacity / 60000000)
                levels[i] = math.min(capacity, level - cost)
                if cost > 0 and levels[i] < 0 then
                    local needed = math.ceil(-levels[i] * 60000 / capacity)
                    if needed > wait then
                        lacking, wait = i, needed
                    end
                end
            end
        end
        local left = {math.floor(levels[1] or 0), math.floor(levels[2] or 0)}
        if lacking > 0 then
            return {lacking, wait, left[1], left[2]}
        end
        for i = 1, 2 do
            if levels[i] then
                redis.call('HSET', KEYS[i], 'level', string.format('%.6f', levels[i]),
                           'time', string.format('%d', now))
                redis.call('PEXPIRE', KEYS[i], 120000)
            end
        end
        return {0, 0, left[1], left[2]}
    """

    def __init__(
        self, gate: RedisGate, when_redis_is_down: Literal["local", "closed"], buckets: TokenBuckets | None = None
    ) -> None:
        self._gate = gate
        self._fails_closed = when_redis_is_down == "closed"
        self._buckets = buckets or TokenBuckets()
        self._take_script = gate.redis.register_script(self.LUA_TAKE_SCRIPT)
        self._tasks = ShieldedTasks()

    async def admit(self, tenant: Tenant, tokens: int, requests: int = 1) -> Charge:
        """Take ``requests`` and ``tokens`` (prompt and most possible output) from ``tenant``'s buckets.

        Counting the tokens is work too, so whoever does that takes the request first, and the tokens with
        ``requests`` 0 once they are known. If the caller is cancelled meanwhile, the tokens go back.

        Raises ``ApiError``: 429 with the time to wait; 400 if ``tokens`` is more than a full bucket holds;
        503 if Redis is down and limits fail closed.
        """
        takes_requests = requests > 0 and tenant.requests_per_minute is not None
        takes_tokens = tokens > 0 and tenant.tokens_per_minute is not None
        if not takes_requests and not takes_tokens:
            return Charge(tenant, 0)
        if tenant.tokens_per_minute is not None and tokens > tenant.tokens_per_minute:
            raise bad_request(
                f"The request may use {tokens} tokens (prompt and max_tokens), "
                f"more than your limit of {tenant.tokens_per_minute} a minute.",
                "max_tokens",
            )
        lacking, wait = self._buckets.take(tenant, requests, tokens)
        _tell_left(tenant, self._buckets.left(tenant))
        if lacking is not None:
            raise _refusal(tenant, lacking, wait)
        admission = self._tasks.start(self._admit_in_redis(tenant, tokens, requests))
        try:
            return await asyncio.shield(admission)
        except asyncio.CancelledError:
            self._tasks.start(self._give_back(admission))
            raise

    async def _admit_in_redis(self, tenant: Tenant, tokens: int, requests: int) -> Charge:
        """The second half of ``admit``: what it took from the buckets of this process goes back if it is refused."""
        try:
            lacking, wait = await self._take_in_redis(tenant, requests, tokens)
        except RedisUnavailable:
            if not self._fails_closed:
                return Charge(tenant, tokens)
            self._buckets.take(tenant, -requests, -tokens)
            raise ApiError(503, "Rate limits cannot be checked at the moment.", retry_after=1) from None
        if lacking is not None:
            self._buckets.take(tenant, -requests, -tokens)
            raise _refusal(tenant, lacking, wait)
        return Charge(tenant, tokens, is_in_redis=True)

    async def _give_back(self, admission: asyncio.Task[Charge]) -> None:
        """Settle what an admission that nobody waits for takes."""
        with contextlib.suppress(ApiError):
            await self.settle(await admission, 0)

    async def settle(self, charge: Charge, tokens_used: int) -> None:
        """Give back what the request was charged beyond ``tokens_used``, also if the caller is cancelled meanwhile."""
        unused = charge.tokens - tokens_used
        if unused <= 0:
            return
        self._buckets.take(charge.tenant, 0, -unused)
        if charge.is_in_redis:
            await self._tasks.run(self._return_to_redis(charge.tenant, unused))

    async def close(self) -> None:
        """Wait for what is still to be given back."""
        await self._tasks.close()

    async def _return_to_redis(self, tenant: Tenant, tokens: int) -> None:
        # An outage is counted and logged by the gate, and the bucket refills by itself.
        with contextlib.suppress(RedisUnavailable):
            await self._take_in_redis(tenant, requests=0, tokens=-tokens)

    async def _take_in_redis(self, tenant: Tenant, requests: int, tokens: int) -> tuple[Limit | None, float]:
        """The same as ``TokenBuckets.take``; raises ``RedisUnavailable``."""
        keys = [f"evospec:limit:{{{tenant.name}}}:{bucket}" for bucket in ("requests", "tokens")]
        arguments = [tenant.requests_per_minute or 0, tenant.tokens_per_minute or 0, requests, tokens]
        lacking, wait_ms, *left = cast(list[Any], await self._gate.run(self._take_script(keys, arguments)))
        untaken = (requests, tokens) if lacking else (0, 0)
        _tell_left(tenant, {"requests": int(left[0]) + untaken[0], "tokens": int(left[1]) + untaken[1]})
        limits: tuple[Limit | None, ...] = (None, "requests", "tokens")
        return limits[int(lacking)], int(wait_ms) / 1000


def _tell_left(tenant: Tenant, left: Mapping[Limit, float]) -> None:
    """Have the response's headers tell what is left, the least that any bucket held in the course of the request.

    ``reset`` is the time until the bucket is full.
    """
    headers = more_headers()
    for limit, capacity in _capacities(tenant).items():
        remaining = f"x-ratelimit-remaining-{limit}"
        least = min(max(0, math.floor(left[limit])), int(headers.get(remaining, capacity)))
        minutes, seconds = divmod(math.ceil((capacity - least) * _MINUTE / capacity), 60)
        headers[f"x-ratelimit-limit-{limit}"] = str(capacity)
        headers[remaining] = str(least)
        headers[f"x-ratelimit-reset-{limit}"] = f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def _refusal(tenant: Tenant, limit: Limit, wait: float) -> ApiError:
    RATE_LIMITED.labels(limit).inc()
    per_minute = tenant.requests_per_minute if limit == "requests" else tenant.tokens_per_minute
    return ApiError(
        429,
        f"Rate limit reached: {per_minute} {limit} a minute. Try again in {wait:.1f} s.",
        code="rate_limit_exceeded",
        retry_after=wait,
    )
