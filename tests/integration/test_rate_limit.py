"""The token buckets, on a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from structlog.testing import capture_logs

from evospec.server.errors import ApiError
from evospec.server.options import RedisConfig
from evospec.server.processes import valkey_url as url_of_valkey_in
from evospec.server.rate_limit import RateLimiter, TokenBuckets
from evospec.server.redis_gate import REDIS_ERRORS, REDIS_SKIPPED, RedisGate
from evospec.server.tenants import Tenant
from tests.running_valkey import running_valkey

PATIENCE = 10.0
"""Seconds in which a Valkey that is there answers, however busy the machine is."""


def tenant(requests: int | None = None, tokens: int | None = None) -> Tenant:
    """A tenant with buckets of its own."""
    return Tenant(name=uuid.uuid4().hex, requests_per_minute=requests, tokens_per_minute=tokens)


@asynccontextmanager
async def limiter_at(
    url: str, when_down: Literal["local", "closed"] = "local", buckets: TokenBuckets | None = None, **config: float
) -> AsyncIterator[RateLimiter]:
    gate = RedisGate(url, RedisConfig(**{"timeout": PATIENCE} | config))
    try:
        yield RateLimiter(gate, when_down, buckets)
    finally:
        await gate.close()


@pytest.fixture
def hung_redis_url(tmp_path: Path) -> Iterator[str]:
    """A socket that takes connections and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "hung.sock"))
        listener.listen()
        yield f"unix://{tmp_path / 'hung.sock'}"


async def test_bucket_admits_a_minutes_worth_then_says_when_to_return(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        someone = tenant(requests=3)
        for _ in range(3):
            await limiter.admit(someone, 10)
        with pytest.raises(ApiError) as caught:
            await limiter.admit(someone, 10)
    assert caught.value.status == 429
    assert caught.value.retry_after == pytest.approx(20, abs=1)


async def test_concurrent_requests_never_exceed_the_limit(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        someone = tenant(requests=10, tokens=10_000)
        results = await asyncio.gather(*(limiter.admit(someone, 1) for _ in range(50)), return_exceptions=True)
    assert sum(not isinstance(result, Exception) for result in results) == 10


async def test_more_requests_at_once_than_the_pool_has_connections_are_no_outage(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        someone = tenant(requests=10)
        results = await asyncio.gather(*(limiter.admit(someone, 1) for _ in range(300)), return_exceptions=True)
    refused = [result.status for result in results if isinstance(result, ApiError)]
    assert refused == [429] * 290


async def test_refusal_by_one_bucket_takes_nothing_from_the_other(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        someone = tenant(requests=2, tokens=100)
        await limiter.admit(someone, 90)
        for _ in range(5):
            with pytest.raises(ApiError, match="100 tokens a minute"):
                await limiter.admit(someone, 50)
        await limiter.admit(someone, 5)  # the second request is still there


async def test_unused_tokens_come_back(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        someone = tenant(tokens=1000)
        charge = await limiter.admit(someone, 1000)
        with pytest.raises(ApiError):
            await limiter.admit(someone, 500)
        await limiter.settle(charge, tokens_used=400)
        await limiter.admit(someone, 600)
        with pytest.raises(ApiError):
            await limiter.admit(someone, 500)


async def test_giving_back_never_overfills(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        someone = tenant(tokens=100)
        charge = await limiter.admit(someone, 100)
        await limiter.settle(charge, 0)
        await limiter.settle(charge, 0)
        await limiter.admit(someone, 100)
        with pytest.raises(ApiError):
            await limiter.admit(someone, 100)


async def test_bucket_refills_with_time(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        someone = tenant(tokens=60_000)  # 1 a millisecond
        await limiter.admit(someone, 60_000)
        refusals = 0
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await limiter.admit(someone, 300)
                    break
                except ApiError as refusal:
                    refusals += 1
                    await asyncio.sleep(refusal.retry_after or 0)
    assert refusals


async def test_request_that_no_full_bucket_could_pay_is_a_bad_request(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        with pytest.raises(ApiError) as caught:
            await limiter.admit(tenant(tokens=100), 101)
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")


async def test_tenants_do_not_share_buckets(valkey_url: str) -> None:
    async with limiter_at(valkey_url) as limiter:
        for _ in range(2):
            await limiter.admit(tenant(requests=1), 1)


async def test_buckets_expire(valkey_url: str) -> None:
    gate = RedisGate(valkey_url, RedisConfig(timeout=PATIENCE))
    someone = tenant(requests=1, tokens=5)
    await RateLimiter(gate, "local").admit(someone, 1)
    keys = [key async for key in gate.redis.scan_iter(f"*{someone.name}*")]
    lifetimes = [await gate.redis.ttl(key) for key in keys]
    await gate.close()
    assert len(keys) == 2
    assert all(60 <= lifetime <= 120 for lifetime in lifetimes)


@pytest.mark.parametrize("redis", ["refused", "hung"])
async def test_without_redis_a_request_waits_for_it_at_most_once(
    redis: str, hung_redis_url: str, tmp_path: Path
) -> None:
    url = hung_redis_url if redis == "hung" else f"unix://{tmp_path / 'nobody.sock'}"
    failed, skipped = REDIS_ERRORS._value.get(), REDIS_SKIPPED._value.get()
    with capture_logs() as lines:
        async with limiter_at(url, timeout=1.0, retry_interval=60) as limiter, asyncio.timeout(30):
            for _ in range(20):
                charge = await limiter.admit(tenant(requests=1, tokens=50), 50)
                await limiter.settle(charge, 10)
    assert [line["event"] for line in lines] == ["redis is down"]
    # One request waited for Redis; the others were admitted at once, and had nothing to give back to Redis.
    assert REDIS_ERRORS._value.get() == failed + 1
    assert REDIS_SKIPPED._value.get() == skipped + 19


async def test_a_valkey_that_stands_still_opens_no_limit(tmp_path: Path) -> None:
    """Of 60 requests 10 are admitted, whether it stands still before, between or after them."""
    async with running_valkey(tmp_path) as valkey:
        for before in (0, 4, 10, 30):
            buckets = TokenBuckets(lambda: 0.0)  # nothing refills, however long this takes
            someone = tenant(requests=10)
            async with limiter_at(url_of_valkey_in(tmp_path), buckets=buckets, timeout=0.5) as limiter:
                answers = await admit_at_once(limiter, someone, before)
                os.kill(valkey.pid, signal.SIGSTOP)
                try:
                    answers += await admit_at_once(limiter, someone, 60 - before)
                finally:
                    os.kill(valkey.pid, signal.SIGCONT)
            assert answers.count(200) == 10
            assert answers.count(429) == 50


async def admit_at_once(limiter: RateLimiter, someone: Tenant, number: int) -> list[int]:
    """The status of each of ``number`` requests."""
    results = await asyncio.gather(*(limiter.admit(someone, 0) for _ in range(number)), return_exceptions=True)
    return [result.status if isinstance(result, ApiError) else 200 for result in results]


async def test_two_servers_share_what_redis_holds_and_what_it_refuses_costs_neither(valkey_url: str) -> None:
    someone = tenant(tokens=100)
    async with limiter_at(valkey_url) as one, limiter_at(valkey_url) as other:
        charge = await one.admit(someone, 90)
        for _ in range(5):
            with pytest.raises(ApiError, match="100 tokens a minute"):
                await other.admit(someone, 50)
        await one.settle(charge, 0)
        await other.admit(someone, 100)


async def test_unused_tokens_come_back_without_redis(tmp_path: Path) -> None:
    someone = tenant(tokens=100)
    buckets = TokenBuckets(lambda: 0.0)
    async with limiter_at(f"unix://{tmp_path / 'nobody.sock'}", buckets=buckets) as limiter:
        charge = await limiter.admit(someone, 100)
        await limiter.settle(charge, 40)
        await limiter.admit(someone, 60)
        with pytest.raises(ApiError, match="100 tokens a minute"):
            await limiter.admit(someone, 1)


@pytest.mark.parametrize("leaves_during", ["admit", "settle"])
async def test_tokens_of_a_client_that_leaves_while_redis_is_asked_come_back(
    tmp_path: Path, leaves_during: str
) -> None:
    someone = tenant(tokens=10)  # lost ones would be back in a minute
    async with running_valkey(tmp_path) as valkey, limiter_at(url_of_valkey_in(tmp_path)) as limiter:
        charge = await limiter.admit(someone, 9)
        if leaves_during == "admit":
            await limiter.settle(charge, 0)
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            others = [asyncio.create_task(limiter.admit(tenant(tokens=1), 1)) for _ in range(20)]  # more than at once
            work = limiter.admit(someone, 9) if leaves_during == "admit" else limiter.settle(charge, 0)
            asked = asyncio.create_task(work)
            await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        await asyncio.gather(*others)
        await until_admitted(limiter, someone, 9)


async def until_admitted(limiter: RateLimiter, someone: Tenant, tokens: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(ApiError):
                await limiter.admit(someone, tokens)
                return
            await asyncio.sleep(0.01)


async def test_redis_down_fails_closed_if_so_set(tmp_path: Path) -> None:
    someone = tenant(requests=1)
    async with limiter_at(f"unix://{tmp_path / 'nobody.sock'}", "closed") as limiter:
        for _ in range(2):
            with pytest.raises(ApiError) as caught:
                await limiter.admit(someone, 1)
            assert (caught.value.status, caught.value.retry_after) == (503, 1)  # not 429: nothing was taken
        await limiter.admit(tenant(), 1)  # a tenant without limits needs no Redis
