"""uvicorn's HTTP protocol, with bounds on what a client can send before anybody has asked for its key.

httptools bounds neither a URL nor headers, and nothing ends a connection that sends them slowly or not at all.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import ApiError

log = structlog.get_logger(__name__)

_FRAMING = 8
"""Bytes around each byte of a body, at most: chunks can be as small as that."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        max_head_bytes: of a request's line and headers, and of trailers; as much again as one read brings is let by.
        head_timeout: seconds from a connection, or from the first byte of a further request, to the end of the headers.
        uvicorns: what uvicorn gives its protocol.
    """

    def __init__(self, *, max_head_bytes: int, head_timeout: float, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._max_head_bytes, self._head_timeout = max_head_bytes, head_timeout
        self._head_bytes, self._body_bytes = 0, 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > self._max_head_bytes + _FRAMING * self._body_bytes and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._start_deadline()

    def on_headers_complete(self) -> None:
        self._end_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes, self._body_bytes = 0, 0
        super().on_message_complete()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self._head_timeout, self._give_up)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        log.debug("connection closed", reason="no request in time")
        self.transport.close()

    def _refuse(self) -> None:
        log.warning("connection closed", reason="request line and headers too large")
        if self.cycle is None or self.cycle.response_complete:  # else an answer is under way
            error = ApiError(431, f"Request line and headers are larger than {self._max_head_bytes} bytes.")
            self.transport.write(_response(431, "Request Header Fields Too Large", error))
        self.transport.close()


def bounded_http(max_head_bytes: int, head_timeout: float) -> Any:
    """``uvicorn.Config.http`` with these bounds."""
    return partial(BoundedHttpProtocol, max_head_bytes=max_head_bytes, head_timeout=head_timeout)


def _response(status: int, phrase: str, error: ApiError) -> bytes:
    body = json.dumps(error.body()).encode()
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body
