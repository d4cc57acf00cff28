"""Server-sent events, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evospec.server.errors import ApiError, internal_error

T = TypeVar("T")

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"
_COMMENT = b": nothing yet\n\n"
SILENCE = 10.0
"""Seconds before an answer's first item in which nothing is sent."""
_encoder = msgspec.json.Encoder()


class ClientDisconnected(Exception):
    """The client went away before the response was complete."""


class StreamFailed(Exception):
    """A stream ended with an error that would have been the answer's ``status``, had none been sent before."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def event(data: msgspec.Struct | dict[str, Any]) -> bytes:
    """One event with ``data`` as JSON."""
    return b"data: " + _encoder.encode(data) + b"\n\n"


def named_event(name: str, data: msgspec.Struct | dict[str, Any]) -> bytes:
    """One event with a name and ``data`` as JSON."""
    return b"event: " + name.encode() + b"\n" + event(data)


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; cancels it and raises ``ClientDisconnected`` if the client goes away first.

    The request's body must have been read.
    """
    task = asyncio.create_task(work)
    listener = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        listener.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Streams encoded events; each item of ``events`` is one write.

    Headers wait for the first item, so an error before it is an ordinary error response; but not for longer than
    ``SILENCE``, since proxies and clients give up. Then comments come until the first item is there. What
    ``encode_failure`` makes of an error after the headers is the last item, and then comes ``StreamFailed``. A client
    that goes away closes ``events`` at once.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], encode_failure: Callable[[ApiError], bytes]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._encode_failure = encode_failure
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_until_disconnect(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._events) as events, _first_of(events) as first:
            await asyncio.wait({first}, timeout=SILENCE)
            if first.done():
                await first
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            failure = None
            try:
                while not first.done():
                    await _write(send, _COMMENT)
                    await asyncio.wait({first}, timeout=SILENCE)
                await _write(send, await first)
                async for data in events:
                    await _write(send, data)
            except ApiError as error:
                failure = error
            except Exception:
                log.exception("stream failed")
                failure = internal_error()
            if failure is not None:
                await _write(send, self._encode_failure(failure))
        await send({"type": "http.response.body", "body": b""})
        if failure is not None:
            raise StreamFailed(failure.status)


@asynccontextmanager
async def _first_of(events: AsyncGenerator[bytes, None]) -> AsyncIterator[asyncio.Future[bytes]]:
    """The first item, which may still have to come; nobody waits for it after the block."""
    first = asyncio.ensure_future(anext(events))
    try:
        yield first
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
