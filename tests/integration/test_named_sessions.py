"""Sessions by names that clients choose: in which fields and headers, whose they are, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from evospec.server.options import SessionsConfig
from evospec.server.session_ids import find_session_id, new_session_id, session_key, sessions_key
from evospec.server.tenants import hash_key
from tests.integration.running_api import CHAT, TEXT
from tests.integration.snapshots import snapshot_of, tokens_of
from tests.integration.test_session_store import ENGINE, Fixture, server_at
from tests.integration.test_sessions import NOT_FOUND, PATHS, error, learning, redis, sees

__all__ = ["redis"]


@pytest.mark.parametrize("path", PATHS)
async def test_the_first_name_that_is_there_counts(serve: Any, path: str) -> None:
    """Each of six requests has another first name, so it finds nothing; the next six find what these left."""
    fields: dict[str, Any] = {"session_id": path, "metadata": {"session_id": f"{path}m"}, "user": path}
    headers = {"X-Session-Id": f"{path}x", "Session-Id": f"{path}s", "X-Session-Affinity": f"{path}a"}
    by_precedence = ["session_id", *headers, "metadata", "user"]
    body = CHAT if "chat" in path else TEXT
    async with serve(learning) as api:
        for number in range(2 * len(by_precedence)):
            left = by_precedence[number % len(by_precedence) :]
            sent = {name: value for name, value in fields.items() if name in left}
            named = {name: value for name, value in headers.items() if name in left}
            await api.client.post(path, json={**body, **sent}, headers=named)
        snapshots = [request.session.snapshot for request in api.engine.requests]
        api.engine.requests.clear()
        for label in ({"metadata": {"session_id": 5}}, {"metadata": {"session_id": ""}}, {"user": ""}):
            await api.client.post(path, json={**body, **label}, headers={"X-Session-Id": ""})
        without = [request.session for request in api.engine.requests]
    assert [bool(snapshot) for snapshot in snapshots] == [False] * 6 + [True] * 6
    assert without == [None] * 3


async def test_a_name_is_the_same_in_header_body_and_path(serve: Any) -> None:
    """httpx and most clients send UTF-8 in headers, too."""
    name = "Zoë"
    async with serve(learning) as api:
        await api.client.post(PATHS[0], json=TEXT, headers={"X-Session-Id": name.encode()})
        await api.post(PATHS[0], session_id=name)
        assert bool(api.engine.requests[1].session.snapshot)
        assert (await api.client.get(f"/v1/sessions/{name}")).status_code == 200


async def test_names_are_short(serve: Any) -> None:
    name = "a" * 513
    async with serve(learning) as api:
        answers = [
            *[await api.post(path, session_id=name) for path in PATHS],
            await api.post(PATHS[0], user=name),
            await api.post(PATHS[0], metadata={"session_id": name}),
            await api.client.post(PATHS[0], json=TEXT, headers={"X-Session-Id": name}),
            await api.client.get(f"/v1/sessions/{name}"),
        ]
        assert api.engine.requests == []
    assert [answer.status_code for answer in answers] == [400] * 6


@pytest.mark.parametrize("name", ["ses_4f1c", "sess_" + "0" * 47, "../models", "é" * 64, "x"])
async def test_any_name_makes_or_continues_a_session_of_one_tenant(serve: Any, redis: Redis, name: str) -> None:
    keys = ",".join(f"{tenant}={hash_key(tenant)}" for tenant in ("acme", "other"))
    of_others = {key async for key in redis.scan_iter()}
    async with serve(learning, "--auth.keys", keys) as api:

        async def seen(tenant: str) -> set[int]:
            headers = {"Authorization": f"Bearer {tenant}"}
            await api.client.post(PATHS[0], json={**TEXT, "prompt": [9], "session_id": name}, headers=headers)
            return tokens_of(api.engine.requests[-1].session.snapshot)

        of_acme, again, of_other = await seen("acme"), await seen("acme"), await seen("other")
    assert (of_acme, again, of_other) == (set(), {9}, set())
    written = {key async for key in redis.scan_iter()} - of_others
    assert written
    assert not [key for key in written if name.encode() in key]


async def test_a_named_session_can_be_looked_at_and_starts_anew_after_its_end(serve: Any) -> None:
    async with serve(learning) as api:
        before = await api.client.get("/v1/sessions/mine")
        assert await sees(api, "mine") == set()
        shown = (await api.client.get("/v1/sessions/mine")).json()
        by_id = (await api.client.get(f"/v1/sessions/{shown['id']}")).json()
        assert await sees(api, shown["id"]) == {1}
        deleted = await api.client.delete("/v1/sessions/mine")
        gone = await api.client.delete("/v1/sessions/mine")
        assert await sees(api, "mine") == set()
    assert error(before) == error(gone) == NOT_FOUND
    assert shown["id"] == by_id["id"] == deleted.json()["id"] == find_session_id("default", "mine")


@pytest.mark.parametrize("name", ["team/alice", "/", "a/../b", "a/", "a//b", "sam\n", "sam\n/x", "50%2F", "é/?#"])
async def test_a_session_of_any_name_can_be_looked_at_and_deleted(serve: Any, name: str) -> None:
    path = f"/v1/sessions/{quote(name, safe='')}"
    async with serve(learning) as api:
        assert await sees(api, name) == set()
        shown = await api.client.get(path)
        deleted = await api.client.delete(path)
        gone = await api.client.get(path)
    assert shown.json()["id"] == deleted.json()["id"] == find_session_id("default", name)
    assert error(gone) == NOT_FOUND


async def test_slashes_of_a_name_need_no_escapes(serve: Any) -> None:
    async with serve(learning) as api:
        await sees(api, "team/alice")
        shown = await api.client.get("/v1/sessions/team/alice")
    assert shown.json()["id"] == find_session_id("default", "team/alice")


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_no_name_is_logged(serve: Any, method: str) -> None:
    template = "/v1/sessions/{session_id}"
    async with serve(learning) as api:
        with capture_logs() as lines:
            await api.client.request(method, "/v1/sessions/team/alice")
        metrics = (await api.client.get("/metrics")).text
    assert "alice" not in str(lines) + metrics
    assert [line["path"] for line in lines if line["event"] == "request"] == [template]
    assert f'endpoint="{template}"' in metrics


async def _known(server: Fixture, tenant: str, names: Sequence[str]) -> list[set[int]]:
    sessions = [await server.store.load(tenant, name, ENGINE) for name in names]
    return [tokens_of(session.state.snapshot) for session in sessions if session is not None]


async def test_a_tenant_has_only_so_many_sessions_and_loses_those_used_longest_ago(valkey_url: str) -> None:
    names = {tenant: [new_session_id(tenant) for _ in range(6)] for tenant in ("acme", "other")}
    async with server_at(valkey_url, SessionsConfig(max_per_tenant=3)) as server:
        for tenant, few in (("other", names["other"][:2]), ("acme", names["acme"][:3])):
            for number, name in enumerate(few):
                session = await server.store.load(tenant, name, ENGINE)
                assert session is not None
                await server.store.save(session, [snapshot_of([number])])
        used = names["acme"][0]
        assert await _known(server, "acme", [used]) == [{0}]
        await server.store.create("acme", names["acme"][3], None, 60)
        await server.store.delete("acme", names["acme"][3])  # its mark counts
        await server.store.create("acme", names["acme"][4], None, 60)
        kept = [await server.gate.redis.exists(session_key("acme", "tiny", name)) for name in names["acme"][:5]]
        size = await server.gate.redis.zcard(sessions_key(session_key("acme", "tiny", used)))
        of_other = await _known(server, "other", names["other"][:2])
    assert kept == [1, 0, 0, 1, 1]
    assert size == 3
    assert of_other == [{0}, {1}]


async def test_a_session_that_makes_room_while_a_request_runs_does_not_come_back(valkey_url: str) -> None:
    names = [new_session_id("acme") for _ in range(2)]
    async with server_at(valkey_url, SessionsConfig(max_per_tenant=1)) as server:
        running = await server.store.load("acme", names[0], ENGINE)
        await server.store.create("acme", names[1], None, None)
        assert running is not None
        await server.store.save(running, [snapshot_of([3])])
        assert await server.gate.redis.exists(running.key) == 0
