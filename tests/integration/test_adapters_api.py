"""/v1/adapters and the metrics of alignment, with a worker whose end of Redis the test holds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from evospec.engine.adapters_config import TokenLogConfig
from evospec.engine.messages import AlignmentStats, EngineStats
from evospec.engine.online.adapter_control import (
    AdapterCommand,
    AdapterStatus,
    WorkerStatus,
    commands_key,
    encode_status,
    status_key,
)
from evospec.server.tenants import hash_key

KEY = "evs-admin"
ADMIN = {"Authorization": f"Bearer {KEY}"}
STREAM = TokenLogConfig().stream
COMMANDS, STATUS = commands_key(STREAM), status_key(STREAM)
OPTIONS = ["--auth.admin_key", hash_key(KEY), "--engine.alignment.enabled"]


@pytest.fixture
def redis(valkey_url: str) -> Iterator[Redis]:
    client = Redis.from_url(valkey_url)
    client.delete(COMMANDS, STATUS)
    yield client
    client.delete(COMMANDS, STATUS)
    client.close()


def worker_status(updated_at: float) -> WorkerStatus:
    return WorkerStatus(
        updated_at=updated_at,
        started_at=0.0,
        pid=1,
        lag=12,
        num_records=34,
        num_lapsed=0,
        num_unusable=0,
        num_trimmed=0,
        num_without_slot=3,
        is_attached=True,
        is_paused=False,
        resident_bytes=1024,
    )


def idle(request: object) -> list[Any]:
    return []


def stats(alignment: AlignmentStats) -> EngineStats:
    return EngineStats(
        num_waiting=0,
        num_running=0,
        blocks_used=0,
        blocks_total=8,
        prefix_query_tokens=0,
        prefix_hit_tokens=0,
        preemptions=0,
        alignment=alignment,
    )


def engine_stats(steps: int, versions: dict[str, int]) -> EngineStats:
    return stats(
        AlignmentStats(
            layout="layout",
            channel_version=9,
            versions=versions,
            loads=3,
            failed_loads=0,
            steps=steps,
            records_hard=5,
            records_sampled=2,
            records_written=6,
            records_dropped_by_queue=1,
            records_dropped_by_redis=0,
        )
    )


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and label "key"."""
    return {
        (sample.name, sample.labels.get("key", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_operators_see_adapters_and_command_the_worker(serve: Any, redis: Redis) -> None:
    async with serve(idle, *OPTIONS) as api:
        empty = await api.client.get("/v1/adapters", headers=ADMIN)
        assert empty.json() == {"object": "list", "worker": None, "data": []}
        adapters = {"law/contracts": AdapterStatus(revision=4, acceptance=0.5), "*": AdapterStatus()}
        redis.hset(STATUS, mapping=encode_status(worker_status(time.time()), adapters))  # type: ignore[arg-type]
        listed = (await api.client.get("/v1/adapters", headers=ADMIN)).json()
        assert [adapter["key"] for adapter in listed["data"]] == ["*", "law/contracts"]
        assert listed["data"][1]["status"]["revision"] == 4
        assert listed["worker"]["lag"] == 12
        for key, action in [("law/contracts", "rollback"), ("*", "freeze"), ("*", "unfreeze"), ("a%2520b", "reset")]:
            response = await api.client.post(f"/v1/adapters/{key}/{action}", headers=ADMIN)
            assert response.status_code == 202, response.text
    commands = [
        msgspec.msgpack.decode(data, type=AdapterCommand)  # type: ignore[arg-type]
        for data in redis.lrange(COMMANDS, 0, -1)
    ]
    assert commands == [
        AdapterCommand("rollback", "law/contracts"),
        AdapterCommand("freeze", "*"),
        AdapterCommand("unfreeze", "*"),
        AdapterCommand("reset", "a%20b"),
    ]


async def test_nobody_else_may(serve: Any, redis: Redis) -> None:
    async with serve(idle, *OPTIONS) as api:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY}):
            assert (await api.client.get("/v1/adapters", headers=headers)).status_code == 401
            assert (await api.client.post("/v1/adapters/a/reset", headers=headers)).status_code == 401
        tenants = {"Authorization": "Bearer tenants"}
        assert (await api.client.get("/v1/adapters", headers=tenants)).status_code == 401
        assert (await api.client.post("/v1/adapters/a/destroy", headers=ADMIN)).status_code == 400
        assert (await api.client.post(f"/v1/adapters/{'a' * 129}/reset", headers=ADMIN)).status_code == 400
    async with serve(idle, *OPTIONS, "--auth.keys", f"acme={hash_key('tenants')}") as api:
        for path, method in (("/v1/adapters", "GET"), ("/v1/adapters/a/reset", "POST")):
            response = await api.client.request(method, path, headers=tenants)
            assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")
        assert (await api.client.get("/v1/adapters")).status_code == 401
    async with serve(idle) as api:
        assert (await api.client.get("/v1/adapters", headers=ADMIN)).status_code == 403
        assert samples((await api.client.get("/metrics")).text)["evospec:alignment_enabled", ""] == 0
    assert redis.llen(COMMANDS) == 0


async def test_redis_that_is_down_is_a_503(serve: Any) -> None:
    async with serve(idle, *OPTIONS, "--engine.alignment.redis_url", "unix:///nobody.sock") as api:
        response = await api.client.get("/v1/adapters", headers=ADMIN)
        assert response.status_code == 503
        assert "Retry-After" in response.headers
        await api.engine.send(stats=engine_stats(10, {}))
        enabled = ("evospec:alignment_enabled", "")
        text = (await api.until_get("/metrics", lambda r: samples(r.text)[enabled] == 1)).text
        assert samples(text)["evospec:alignment_worker_up", ""] == 0


async def test_metrics(serve: Any, redis: Redis) -> None:
    async with serve(idle, *OPTIONS) as api:
        await api.engine.send(stats=engine_stats(10, {"law": 9, "clinic": 7}))
        await api.engine.send(stats=engine_stats(15, {"law": 9}))
        adapters = {"law": AdapterStatus(revision=4, acceptance=0.5)}
        redis.hset(STATUS, mapping=encode_status(worker_status(time.time()), adapters))  # type: ignore[arg-type]
        wanted, is_up = ("evospec:alignment_steps_total", ""), ("evospec:alignment_worker_up", "")

        def has_come(response: httpx.Response) -> bool:
            shown = samples(response.text)
            return shown[wanted] == 15 and shown[is_up] == 1  # the worker's are asked for in Redis, which may be slow

        text = (await api.until_get("/metrics", has_come)).text
        found = samples(text)
        assert found["evospec:alignment_draft_version", "law"] == 9
        assert ("evospec:alignment_draft_version", "clinic") not in found
        assert found["evospec:alignment_records_dropped_by_queue_total", ""] == 1
        assert found["evospec:alignment_worker_lag_records", ""] == 12
        assert found["evospec:alignment_worker_num_without_slot", ""] == 3
        assert found["evospec:alignment_adapter_acceptance", "law"] == 0.5
        assert ("evospec:alignment_adapter_loss", "law") not in found
        redis.hset(STATUS, mapping=encode_status(worker_status(time.time() - 60), adapters))  # type: ignore[arg-type]
        found = samples((await api.client.get("/metrics")).text)
        assert found["evospec:alignment_worker_up", ""] == 0
        assert ("evospec:alignment_adapter_acceptance", "law") not in found
        assert math.isnan(found["evospec:alignment_worker_lag_records", ""])
