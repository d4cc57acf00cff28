"""Who has no key costs nobody anything, and nobody can hold a request for ever: HTTP over the whole application."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Iterable
from typing import Any

import pytest

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.server.tenants import hash_key
from tests.integration.http_sockets import Connection, is_closed, pour, read_response
from tests.integration.running_api import Api

PATHS = [
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /tokenize",
    "POST /nowhere",
    "GET /v1/models",
    "GET /health",
    "DELETE /v1/sessions/x",
]


def one_token(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300], finish_reason="stop")


async def connect(api: Api) -> Connection:
    return await asyncio.open_connection("127.0.0.1", api.client.base_url.port)


def keys(name: str) -> tuple[str, str]:
    return "--auth.keys", f"{name}={hash_key('secret')}"


def open_files() -> list[str]:
    return [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", [b"10000\r\n" + b"y" * 65536 + b"\r\n", b"1\r\ny\r\n" * 10_000])
async def test_a_body_without_end_is_answered_and_cut_off(serve: Any, path: str, data: bytes) -> None:
    async with serve(one_token, *keys("acme")) as api:
        reader, writer = await connect(api)
        writer.write(f"{path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        await pour(writer, data)
        assert await is_closed(reader)
        assert (await api.client.get("/health")).status_code == 200


async def test_who_reads_nothing_of_a_large_file_keeps_no_file_open(serve: Any) -> None:
    """There are files for all connections and for the engine and Redis, not for two of each client."""
    async with serve(one_token, *keys("acme")) as api:
        _, writer = await connect(api)
        writer.write(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n" * 16)
        connections = api.server.server_state.connections
        await api.until(lambda: any(each.transport.get_write_buffer_size() for each in connections))
        files = open_files()
        writer.close()
    assert not [file for file in files if "swagger" in file]


async def test_limits_hold_while_clients_without_a_key_send_without_end(serve: Any) -> None:
    async with serve(
        one_token, *keys(uuid.uuid4().hex), "--limits.requests_per_minute", "10", "--redis.timeout", "0.05"
    ) as api:

        async def attack() -> None:
            while True:
                _, writer = await connect(api)
                writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
                await pour(writer, b"1\r\ny\r\n" * 40_000)
                writer.close()

        attackers = [asyncio.create_task(attack()) for _ in range(4)]
        api.client.headers["Authorization"] = "Bearer secret"
        started = time.monotonic()
        answers = await asyncio.gather(*(api.client.post("/tokenize", json={"prompt": "hi"}) for _ in range(60)))
        refilled = (time.monotonic() - started) * 10 / 60
        for attacker in attackers:
            attacker.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)
    statuses = [answer.status_code for answer in answers]
    assert 10 <= statuses.count(200) <= 11 + refilled
    assert statuses.count(429) == 60 - statuses.count(200)


async def test_a_body_with_a_key_that_stops_gets_a_408(serve: Any) -> None:
    async with serve(one_token, *keys("acme"), "--http.body_timeout", "0.2") as api:
        reader, writer = await connect(api)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
        )
        status, body = await read_response(reader)
        assert (status, await is_closed(reader)) == (408, True)
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        writer.close()
