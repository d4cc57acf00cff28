"""Sessions over HTTP: lifecycle, tenants, requests that run while a session changes, a Redis that comes and goes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.processes import valkey_url
from evospec.server.session_ids import session_key
from evospec.server.tenants import hash_key
from tests.integration.running_api import running_api
from tests.integration.snapshots import snapshot_of, tokens_of
from tests.running_valkey import running_valkey

PATHS = ["/v1/completions", "/v1/chat/completions"]
NO_USERS = ("--no-sessions.from_user",)


def learning(request: EngineRequest) -> Iterable[EngineOutput]:
    """Ends with what the session knew and the prompt's own tokens."""
    snapshot = None
    if request.session is not None:
        snapshot = snapshot_of({*tokens_of(request.session.snapshot), *request.prompt_token_ids})
    yield EngineOutput(
        request_id=request.request_id,
        token_ids=[100],
        finish_reason="length",
        session_snapshot=snapshot,
        num_draft_tokens=2,
    )


def waiting(request: EngineRequest) -> Iterable[EngineOutput]:
    """One token; the test sends the end."""
    yield EngineOutput(request_id=request.request_id, token_ids=[100])


def end_of(request: EngineRequest, learned: Iterable[int]) -> EngineOutput:
    return EngineOutput(
        request_id=request.request_id, token_ids=[101], finish_reason="stop", session_snapshot=snapshot_of(learned)
    )


async def start(api: Any, **body: Any) -> str:
    """The id of a new session."""
    response = await api.client.post("/v1/sessions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def sees(api: Any, session_id: str) -> set[int]:
    """What a request of the session brings to the engine; it adds token 1."""
    response = await api.post("/v1/completions", prompt=[1], session_id=session_id)
    assert response.status_code == 200, response.text
    return tokens_of(api.engine.requests[-1].session.snapshot)


def error(response: Any) -> tuple[int, str | None, str | None]:
    detail = response.json()["error"]
    return response.status_code, detail["code"], detail["param"]


NOT_FOUND = (404, "session_not_found", "session_id")


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(valkey_url)
    yield client
    await client.aclose()


async def test_from_the_first_request_to_the_end(serve: Any) -> None:
    async with serve(learning) as api:
        before = int(time.time())
        made = (await api.client.post("/v1/sessions", json={"domain": "law", "ttl_seconds": 60})).json()
        shown = (await api.client.get(f"/v1/sessions/{made['id']}")).json()
        await api.events("/v1/completions", prompt=[5, 6], session_id=made["id"])
        await api.client.post(
            "/v1/completions", json={"model": "tiny", "prompt": [7]}, headers={"X-Session-Id": made["id"]}
        )
        await api.post("/v1/chat/completions", session_id=made["id"])
        first, second, third = [request.session for request in api.engine.requests]
        deleted = await api.client.delete(f"/v1/sessions/{made['id']}")
        refused = [
            await api.client.get(f"/v1/sessions/{made['id']}"),
            await api.client.delete(f"/v1/sessions/{made['id']}"),
            *[await api.post(path, session_id=made["id"]) for path in PATHS],
        ]
        num_requests = len(api.engine.requests)
    assert made["object"] == "session"
    assert made["domain"] == "law"
    assert before <= made["created"] <= time.time()
    assert made["expires_at"] == pytest.approx(made["created"] + 60, abs=2)
    assert {**shown, "expires_at": 0} == {**made, "expires_at": 0}
    assert {first.domain, second.domain, third.domain} == {"law"}
    assert first.snapshot == b""
    assert tokens_of(second.snapshot) == {5, 6}
    assert tokens_of(third.snapshot) == {5, 6, 7}
    assert deleted.json() == {"id": made["id"], "object": "session.deleted", "deleted": True}
    assert [error(response) for response in refused] == [NOT_FOUND] * 4
    assert num_requests == 3


async def test_everything_is_optional_even_the_body(serve: Any) -> None:
    async with serve(learning) as api:
        bare = await api.client.post("/v1/sessions")
        empty = await api.client.post("/v1/sessions", json={})
        await api.post("/v1/completions")
        assert api.engine.requests[-1].session is None
    assert [bare.status_code, empty.status_code] == [200, 200]
    assert bare.json()["domain"] is None
    assert bare.json()["expires_at"] == pytest.approx(time.time() + 24 * 3600, abs=5)
    assert bare.json()["id"] != empty.json()["id"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"domain": "Law"}, "domain"),
        ({"domain": "a" * 33}, "domain"),
        ({"domain": "law\n"}, "domain"),
        ({"domain": ""}, "domain"),
        ({"domain": 5}, "domain"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": "60"}, "ttl_seconds"),
        ({"ttl_seconds": 101}, "ttl_seconds"),
        ({"user": "someone"}, "user"),
        ({"id": "mine"}, "id"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(serve: Any, body: dict[str, Any], param: str) -> None:
    async with serve(learning, "--sessions.max_ttl_seconds", "100", *NO_USERS) as api:
        response = await api.client.post("/v1/sessions", json=body)
    assert error(response)[::2] == (400, param)


async def test_tenants_never_meet(serve: Any, redis: Redis) -> None:
    keys = ",".join(f"{name}={hash_key(name)}" for name in ("acme", "other"))
    async with serve(learning, "--auth.keys", keys) as api:

        async def send(tenant: str, method: str, path: str, **body: Any) -> Any:
            headers = {"Authorization": f"Bearer {tenant}"}
            return await api.client.request(method, path, headers=headers, **({"json": body} if body else {}))

        async def complete(tenant: str, **body: Any) -> Any:
            return await send(tenant, "POST", "/v1/completions", model="tiny", **body)

        session_id = (await send("acme", "POST", "/v1/sessions")).json()["id"]
        await complete("acme", prompt=[9], session_id=session_id)
        refused = [
            await send("other", "GET", f"/v1/sessions/{session_id}"),
            await send("other", "DELETE", f"/v1/sessions/{session_id}"),
            await complete("other", prompt=[1], session_id=session_id),
        ]
        await complete("acme", prompt=[1], session_id=session_id)
        seen = tokens_of(api.engine.requests[-1].session.snapshot)
        for tenant in ("acme", "other"):
            await complete(tenant, prompt=[2], user="sam")
        states = [request.session.snapshot for request in api.engine.requests[-2:]]
        without_key = await api.client.get(f"/v1/sessions/{session_id}")
    assert [error(response) for response in refused] == [NOT_FOUND] * 3
    assert seen == {9}
    assert states == [b"", b""]
    assert without_key.status_code == 401
    assert not [key async for key in redis.scan_iter("*acme*") if b"limit" not in key]


@pytest.mark.parametrize("session_id", ["sess_" + "0" * 48, "user_" + "0" * 48, "name_" + "f" * 48])
async def test_a_mistyped_id_of_a_server_is_unknown(serve: Any, session_id: str) -> None:
    async with serve(learning) as api:
        responses = [await api.post(path, session_id=session_id) for path in PATHS]
        assert api.engine.requests == []
    assert [error(response) for response in responses] == [NOT_FOUND] * 2


async def test_a_session_for_each_user(serve: Any, redis: Redis) -> None:
    name = "sam@example.com"
    async with serve(learning) as api:
        made = (await api.client.post("/v1/sessions", json={"user": name, "domain": "code"})).json()
        for prompt, user in ([1], name), ([2], "another"), ([3], name), ([4], None), ([5], ""):
            await api.post("/v1/completions", prompt=prompt, user=user)
        states = [request.session for request in api.engine.requests]
        explicit = await start(api)
        assert await sees(api, explicit) == set()
        again = (await api.client.post("/v1/sessions", json={"user": name, "domain": "law"})).json()
        await api.client.delete(f"/v1/sessions/{made['id']}")
        gone = await api.client.get(f"/v1/sessions/{made['id']}")
        await api.post("/v1/completions", prompt=[1], user=name)
        fresh = api.engine.requests[-1].session
    assert [state and tokens_of(state.snapshot) for state in states] == [set(), set(), {1}, None, None]
    assert [state and state.domain for state in states] == ["code", "", "code", None, None]
    assert (again["id"], again["domain"], again["created"]) == (made["id"], "code", made["created"])
    assert error(gone) == NOT_FOUND
    assert fresh.snapshot == b""
    assert not [key async for key in redis.scan_iter("*sam*")]


async def test_user_is_a_mere_label_otherwise(serve: Any) -> None:
    async with serve(learning, *NO_USERS) as api:
        assert (await api.post("/v1/completions", user="sam")).status_code == 200
        assert api.engine.requests[-1].session is None


async def test_use_extends_life_and_looking_does_not(serve: Any, redis: Redis) -> None:
    async with serve(learning) as api:
        session_id = await start(api, domain="law", ttl_seconds=1000)
        key = session_key("default", "tiny", session_id)
        await redis.expire(key, 10)
        shown = (await api.client.get(f"/v1/sessions/{session_id}")).json()
        assert await redis.ttl(key) <= 10
        await sees(api, session_id)
        extended = await redis.ttl(key)
        await redis.pexpire(key, 1)
        await asyncio.sleep(0.01)
        expired = await api.client.get(f"/v1/sessions/{session_id}")
        assert await sees(api, session_id) == set()  # served all the same
        assert api.engine.requests[-1].session.domain == ""
        assert await sees(api, session_id) == {1}
        assert 0 < await redis.ttl(key) <= 24 * 3600
    assert shown["expires_at"] <= time.time() + 11
    assert 990 < extended <= 1000
    assert error(expired) == NOT_FOUND


@pytest.mark.parametrize("by_user", [False, True])
async def test_a_request_that_still_runs_does_not_bring_back_what_was_deleted(
    serve: Any, redis: Redis, by_user: bool
) -> None:
    async with serve(waiting) as api:
        session_id = await start(api, **({"user": "sam"} if by_user else {}))
        naming = {"user": "sam"} if by_user else {"session_id": session_id}
        running = asyncio.create_task(api.post("/v1/completions", **naming))
        await api.until(lambda: api.engine.requests)
        await api.client.delete(f"/v1/sessions/{session_id}")
        if by_user:  # a new session of the same name is not the old one
            await start(api, user="sam")
        await api.engine.send(end_of(api.engine.requests[0], {3, 4}))
        assert (await running).status_code == 200
        fields = await redis.hgetall(session_key("default", "tiny", session_id))
        shown = await api.client.get(f"/v1/sessions/{session_id}")
        text = (await api.client.get("/metrics")).text
    assert b"snapshot" not in fields
    assert shown.status_code == (200 if by_user else 404)
    assert (
        'session_operations_total{domain="",model="tiny",operation="save",outcome="gone",tenant="default"} 1.0' in text
    )


async def test_two_requests_at_once_lose_nothing(serve: Any) -> None:
    async with serve(waiting) as api:
        session_id = await start(api)
        running = [asyncio.create_task(api.post("/v1/completions", session_id=session_id)) for _ in range(2)]
        await api.until(lambda: len(api.engine.requests) == 2)
        first, second = api.engine.requests
        await api.engine.send(end_of(first, {3, 4}), end_of(second, {4, 5}))
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        last = asyncio.create_task(api.post("/v1/completions", session_id=session_id))
        await api.until(lambda: len(api.engine.requests) == 3)
        assert tokens_of(api.engine.requests[2].session.snapshot) == {3, 4, 5}
        await api.engine.send(end_of(api.engine.requests[2], set()))
        await last


async def test_choices_of_a_request_are_merged(serve: Any) -> None:
    async with serve(learning) as api:
        session_id = await start(api)
        await api.post("/v1/completions", prompt=[[3], [4], [5]], n=2, session_id=session_id)
        assert await sees(api, session_id) == {3, 4, 5}


async def test_what_choices_have_learned_is_kept_when_the_client_leaves(serve: Any) -> None:
    async with serve(waiting) as api:
        session_id = await start(api)
        running = asyncio.create_task(api.post("/v1/completions", n=2, session_id=session_id))
        await api.until(lambda: len(api.engine.requests) == 2)
        await api.engine.send(end_of(api.engine.requests[0], {3}))
        tokens = 'evospec:generation_tokens_total{model="tiny",tenant="default"} 3.0'
        await api.until_get("/metrics", lambda response: tokens in response.text)  # so the server has read that end
        running.cancel()
        await api.until(lambda: api.engine.aborted)
        [unfinished] = api.engine.aborted
        await api.engine.send(
            EngineOutput(request_id=unfinished, finish_reason="aborted", session_snapshot=snapshot_of({4}))
        )
        async with asyncio.timeout(20):
            while True:
                count = len(api.engine.requests)
                task = asyncio.create_task(api.post("/v1/completions", session_id=session_id))
                await api.until(lambda n=count: len(api.engine.requests) == n + 1)
                request = api.engine.requests[-1]
                await api.engine.send(end_of(request, set()))
                await task
                if tokens_of(request.session.snapshot) == {3, 4}:
                    break


async def test_domains_label_metrics_within_bounds(serve: Any) -> None:
    async with serve(learning, draft="tiny") as api:
        for number in range(12):
            await api.post("/v1/completions", session_id=await start(api, domain=f"subject-{number}"))
        text = (await api.client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("evospec:spec_decode_num_drafts_total")]
    domains = {line.split('domain="')[1].split('"')[0]: line.split()[-1] for line in lines}
    assert domains == {"": "0.0", **{f"subject-{number}": "1.0" for number in range(10)}, "other": "2.0"}
    assert 'evospec:session_seconds_count{domain="other",model="tiny",operation="load",tenant="default"} 2.0' in text


async def test_openapi_has_sessions(serve: Any) -> None:
    async with serve(learning) as api:
        schema = (await api.client.get("/openapi.json")).json()
    assert set(schema["paths"]["/v1/sessions/{session_id}"]) == {"get", "delete"}
    assert set(schema["paths"]["/v1/sessions"]["post"]["responses"]) == {
        "200",
        "400",
        "401",
        "403",
        "413",
        "429",
        "503",
    }
    assert {"Session", "DeletedSession", "CreateSessionRequest"} <= set(schema["components"]["schemas"])
    for path in PATHS:
        assert "X-Session-Id" in [p["name"] for p in schema["paths"][path]["post"]["parameters"]]


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_redis_comes_and_goes_under_load_and_no_request_fails(
    how: signal.Signals, tiny_model: ModelFiles, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    statuses: list[int] = []

    async def load(api: Any, session_id: str) -> None:
        while True:
            response = await api.post("/v1/completions", prompt=[7], session_id=session_id)
            statuses.append(response.status_code)

    def last_is_cold(api: Any) -> bool:
        return api.engine.requests[-1].session is None

    options = ("--redis.timeout", "0.1", "--redis.retry_interval", "0.05")
    async with (
        running_valkey(tmp_path) as valkey,
        running_api(learning, tiny_model, tokenizer, valkey_url(tmp_path), tmp_path, *options) as api,
    ):
        session_id = await start(api, domain="law")
        with capture_logs() as lines:
            clients = [asyncio.create_task(load(api, session_id)) for _ in range(4)]
            await api.until(lambda: len(statuses) > 20 and not last_is_cold(api))
            os.kill(valkey.pid, how)
            await api.until(lambda: last_is_cold(api))
            if how == signal.SIGSTOP:
                refused = await api.client.get(f"/v1/sessions/{session_id}")
                assert error(refused)[:2] == (503, "sessions_unavailable")
                os.kill(valkey.pid, signal.SIGCONT)
            # Killed, it is started again, and knows nothing.
            await api.until(lambda: (last := api.engine.requests[-1].session) is not None and last.snapshot)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        resumed = api.engine.requests[-1].session
        text = (await api.client.get("/metrics")).text
    assert set(statuses) == {200}
    assert resumed is not None
    assert tokens_of(resumed.snapshot) == {7}
    assert resumed.domain == ("law" if how == signal.SIGSTOP else "")
    unavailable = [line for line in text.splitlines() if 'operation="load",outcome="unavailable"' in line]
    assert float(unavailable[0].split()[-1]) >= 1
    assert [line["event"] for line in lines].count("redis is down") >= 1
    assert "unexpected error" not in [line["event"] for line in lines]
