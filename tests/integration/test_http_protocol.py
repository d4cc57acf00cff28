"""What a client can send before its headers are complete is bounded, over real sockets; bodies are not concerned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from server.http_protocol import bounded_http

LIMIT = 4096
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Connection]]


async def answer_with_size(scope: Any, receive: Any, send: Any) -> None:
    """An application that says how long the body was."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(str(size)))]})
    await send({"type": "http.response.body", "body": str(size).encode()})


@asynccontextmanager
async def serving(head_timeout: float = 60.0) -> AsyncIterator[Connect]:
    http = bounded_http(LIMIT, head_timeout)
    config = uvicorn.Config(answer_with_size, port=0, log_config=None, lifespan="off", http=http)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    writers = []
    async with asyncio.timeout(60):
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]

        async def connect() -> Connection:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            return reader, writer

        try:
            yield connect
        finally:
            for writer in writers:
                writer.close()
            server.should_exit = True
            await task


async def read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    return int(head.split()[1]), await reader.readexactly(length)


async def is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * LIMIT,
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * LIMIT,
        b"GET /" + b"x" * LIMIT,
    ],
)
async def test_a_head_without_end_is_refused(head: bytes) -> None:
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(head)
        status, body = await read_response(reader)
        assert (status, await is_closed(reader)) == (431, True)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_bodies_of_any_length_and_many_requests_on_one_connection_pass() -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\na: " + b"x" * (LIMIT // 2) + b"\r\n"
    plain = head + b"content-length: 1000000\r\n\r\n" + b"y" * 1_000_000
    tiny_chunks = head + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\ny\r\n" * 20_000 + b"0\r\n\r\n"
    async with serving() as connect:
        reader, writer = await connect()
        for request, size in [(plain, b"1000000"), (tiny_chunks, b"20000")] * 2:
            writer.write(request)
            assert await read_response(reader) == (200, size)
        for _ in range(2):  # sent at once
            writer.write(plain + plain)
            assert [await read_response(reader), await read_response(reader)] == [(200, b"1000000")] * 2


async def test_trailers_without_end_are_cut_off() -> None:
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\ny\r\n0\r\na: " + b"x" * 2 * LIMIT
        )
        assert await is_closed(reader)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"\r\n" * 100])
async def test_a_connection_that_sends_no_request_is_closed(sent: bytes) -> None:
    async with serving(head_timeout=0.1) as connect:
        reader, writer = await connect()
        writer.write(sent)
        assert await is_closed(reader)


async def test_the_time_for_a_head_does_not_end_what_takes_long_afterwards() -> None:
    """A body may come slowly, and a further request has its own time."""
    async with serving(head_timeout=0.2) as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n1")
            await asyncio.sleep(0.4)
            writer.write(b"2")
            assert await read_response(reader) == (200, b"2")
        writer.write(b"GET / HT")
        assert await is_closed(reader)
