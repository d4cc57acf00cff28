"""uvicorn's HTTP protocol, with bounds on what a client can send, whether or not anybody has asked for its key.

httptools bounds neither a URL nor headers, and nothing ends a connection that sends slowly, not at all, or what nobody
will read, or that does not read its answer.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from evospec.server.connections import ConnectionLimit
from evospec.server.errors import ApiError, shutting_down
from evospec.server.options import HttpConfig

log = structlog.get_logger(__name__)

LINGER = 2.0
"""Seconds that a connection stays for its client to read the answer, while what arrives is thrown away."""
_PIECE = 16 * 1024
"""Bytes parsed before anybody looks at what they were: a read of a quarter of a megabyte can be 50,000 chunks."""
_MOST_PIPELINED = 16
"""Requests that wait behind one in work."""
_SLOWEST_BODY = 1024
"""Bytes a second."""
_BODY_GRACE = 10.0
"""Seconds before a body can be too slow."""
READING_TIMEOUT = 60.0
"""Seconds in which a client has to take something of what is there for it to read."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection.

    Requests are answered in their order. A connection ends after an answer that was given before its request was
    complete, or if what follows the requests in work cannot be served; it ends gently: with ``connection: close``, and
    closed for writing first, because a socket that is closed with unread bytes in it resets, which can cost the client
    the answer. ``max_header_bytes`` holds for trailers and for what surrounds the bytes of a body in chunks, too.
    """

    def __init__(self, *, bounds: HttpConfig, connections: ConnectionLimit, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._bounds, self._connections = bounds, connections
        self._is_counted = False
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._keeps_alive = False  # after the request whose body arrives
        self._head_bytes, self._body_bytes = 0, 0
        self._body_seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._bytes_answered = 0
        self._reading_timer: asyncio.TimerHandle | None = None
        self._discards = False
        self._left_to_discard = bounds.max_body_bytes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_counted = self._connections.open(self._address)
        if self._is_counted:
            self._start_timer(self._bounds.header_timeout, self._give_up)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._reading_timer is not None:
            self._reading_timer.cancel()
        if self._is_counted:
            self._connections.close(self._address)
        while self._unanswered:
            _disconnect(self._unanswered.pop())
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            if self._discards:
                self._discard(len(piece))
            else:
                self._parse(piece)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # ``_feed`` goes on with it
        if len(self._unanswered) > _MOST_PIPELINED:
            raise ValueError("too many requests before their answers")  # ends the parser's work
        super().on_headers_complete()
        # Only a request that is complete can be followed by another.
        self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
        self.cycle.transport = cast(asyncio.Transport, _AnswerTransport(self, self.cycle))
        self._unanswered.append(self.cycle)
        self._body_bytes, self._body_seconds = 0, 0.0
        self._start_timer(self._body_tick, self._look_at_body)

    def on_body(self, body: bytes) -> None:
        self._head_bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._stop_timer()
        self._head_bytes, self._body_bytes = 0, 0
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def shutdown(self) -> None:
        """End the connection after the requests in work; one that has not arrived whole is refused."""
        if self._discards:
            return  # it ends anyway
        if self._unanswered and self._unanswered[-1].more_body:
            self._refuse(shutting_down())
        else:
            super().shutdown()

    def write_answer(self, data: bytes) -> None:
        """Send a piece of an answer, and see that the client takes it."""
        self.transport.write(data)
        self._bytes_answered += len(data)
        if self._reading_timer is None:
            self._watch_reading()

    def close_after(self, cycle: RequestResponseCycle) -> None:
        """End the connection after the answer of ``cycle``."""
        if self.transport.is_closing():
            return
        if self._discards or cycle.more_body:
            self._linger()
        else:
            self.transport.close()

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def _body_tick(self) -> float:
        return min(1.0, self._bounds.body_timeout / 8)

    def _parse(self, piece: bytes) -> None:
        if not self._unanswered and self._timer is None:
            self._start_timer(self._bounds.header_timeout, self._give_up)
        self._unset_keepalive_if_required()
        self._head_bytes += len(piece)
        self._feed(piece)
        if self._head_bytes > self._bounds.max_header_bytes + self._body_bytes and not self._discards:
            what = "The framing of the body is" if self._body_bytes else "Request line and headers are"
            self._refuse(ApiError(431, f"{what} larger than {self._bounds.max_header_bytes} bytes."))

    def _feed(self, data: bytes) -> None:
        """Parse. A head that asks for another protocol is parsed again without that, which HTTP/1.1 may ignore.

        httptools ends at such a head, and would take the body for another protocol's.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                self.send_400_response("This is no proxy.")
                return
            fields = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
            self.parser = httptools.HttpRequestParser(self)
            self._feed(b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, fields) + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _look_at_body(self) -> None:
        """Count the time that a body takes, but for that in which nobody here would take it or has asked for it."""
        if not self.flow.read_paused and not self.cycle.waiting_for_100_continue:
            self._body_seconds += self._body_tick
        if self._body_seconds > longest_body_time(self._body_bytes, self._bounds.body_timeout):
            self._refuse(ApiError(408, "The request body came too slowly."))
        else:
            self._start_timer(self._body_tick, self._look_at_body)

    def _watch_reading(self) -> None:
        """While there is something that the client has not taken, look again later."""
        self._reading_timer = None
        if unsent := self.transport.get_write_buffer_size():
            taken = self._bytes_answered - unsent
            self._reading_timer = self.loop.call_later(READING_TIMEOUT, self._look_at_reading, taken)

    def _look_at_reading(self, taken_before: int) -> None:
        if self._bytes_answered - self.transport.get_write_buffer_size() > taken_before:
            self._watch_reading()
        else:
            log.info("connection closed", reason="nothing of the answer was read in time")
            _reset(self.transport)

    def _refuse(self, error: ApiError) -> None:
        """Answer the request that is arriving with ``error``, and end the connection after the answers in work."""
        log.info("request refused", status=error.status, reason=error.message)
        arriving = self._unanswered[-1] if self._unanswered else None
        if arriving is not None and arriving.more_body and not arriving.response_started:
            _disconnect(self._unanswered.pop())
            if self._unanswered:
                self.pipeline.popleft()
        if self._unanswered:
            self._unanswered[-1].keep_alive = False
            self._discards = True
            self._stop_timer()
        else:
            self.transport.write(_encoded(error))
            self._linger()

    def _linger(self) -> None:
        self._discards = True
        self.pipeline.clear()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._start_timer(LINGER, self.transport.abort)

    def _discard(self, num_bytes: int) -> None:
        self._left_to_discard -= num_bytes
        if self._left_to_discard < 0:
            self.transport.abort()

    def _give_up(self) -> None:
        log.debug("connection closed", reason="no request in time")
        self.transport.close()

    def _start_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _AnswerTransport:
    """What uvicorn needs of a transport to send the answer of ``cycle``."""

    def __init__(self, protocol: BoundedHttpProtocol, cycle: RequestResponseCycle) -> None:
        self.write = protocol.write_answer
        self.is_closing = protocol.transport.is_closing
        self.close = partial(protocol.close_after, cycle)


def bounded_http(bounds: HttpConfig, max_connections: int) -> Any:
    """``uvicorn.Config.http`` with these bounds, for one server."""
    connections = ConnectionLimit(max_connections, bounds.max_address_share)
    return partial(BoundedHttpProtocol, bounds=bounds, connections=connections)


def longest_body_time(num_bytes: int, timeout: float) -> float:
    """Seconds that a body may have taken of which so many bytes are there."""
    return min(timeout, _BODY_GRACE + num_bytes / _SLOWEST_BODY)


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Let the application find that nobody waits for its answer."""
    cycle.disconnected = True
    cycle.message_event.set()


def _reset(transport: asyncio.Transport) -> None:
    """End a connection at once, without what the system still has to send: it would keep that for the client."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _encoded(error: ApiError) -> bytes:
    response = error.response()
    headers = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    return STATUS_LINE[error.status] + headers + b"connection: close\r\n\r\n" + bytes(response.body)
