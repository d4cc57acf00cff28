"""Raw connections to a server, for tests of what a client can send; and a small application that is told what to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from evospec.server.http_protocol import bounded_http
from evospec.server.options import HttpConfig

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Connection]]


async def answer_with_size(scope: Any, receive: Any, send: Any) -> None:
    """An application that says how long the body was; at ``/refused`` one that does not look at it."""
    size, more = 0, scope["path"] != "/refused"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    status = 401 if scope["path"] == "/refused" else 200
    body = str(size).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(app: Any = answer_with_size, max_connections: int = 100, **bounds: Any) -> AsyncIterator[Connect]:
    """A server of ``app`` with ``bounds`` (of ``HttpConfig``); gives what connects to it."""
    config = HttpConfig(**{"header_timeout": 60.0} | bounds)
    http = bounded_http(config, max_connections)
    common: dict[str, Any] = {"log_config": None, "ws": "none", "timeout_keep_alive": config.keep_alive_timeout}
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", http=http, **common))
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
    """Status and body of the next response, which says how long it is."""
    head, body = await read_whole_response(reader)
    return int(head.split()[1]), body


async def read_whole_response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Status line with headers, in small letters, and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    return head, await reader.readexactly(length)


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait for the connection's end; False if something comes before it."""
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


async def pour(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send ``data`` again and again until the other side has enough."""
    try:
        while True:
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
