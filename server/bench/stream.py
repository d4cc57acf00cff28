"""A streaming HTTP client for OpenAI-compatible servers, made to cost as little CPU as it can.

The load generator shares two cores with the server it measures, so a general HTTP client would slow what it
measures. This one is an ``asyncio.Protocol`` over httptools' C parser and msgspec's JSON decoder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

REQUEST_TIMEOUT = 600.0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Speculation(msgspec.Struct):
    """What EvoSpec tells of a request's drafts, as in ``server.schemas.answers.SpeculativeDecoding``."""

    num_spec_steps: int = 0
    num_accepted_draft_tokens: int = 0
    draft_version: int = 0


class _Metrics(msgspec.Struct):
    speculative_decoding: Speculation | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: Any = None


@dataclass
class StreamResult:
    """One request as the client saw it. Times in seconds of ``time.perf_counter``.

    ``token_times`` has one entry per event that carried text; a server may put several tokens in one event.
    ``error`` is None when the stream ended as it should, with a finish reason.
    """

    start: float
    end: float = 0.0
    token_times: list[float] = field(default_factory=list)
    text_parts: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    speculation: Speculation | None = None

    @property
    def text(self) -> str:
        return "".join(self.text_parts)


class _StreamProtocol(asyncio.Protocol):
    """Sends one request and collects its server-sent events; the connection closes with the response."""

    def __init__(self, request: bytes) -> None:
        self.result = StreamResult(start=time.perf_counter())
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parser: Any = httptools.HttpResponseParser(self)
        self._decoder = msgspec.json.Decoder(_Event)
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.DecodeError) as error:
            self._finish(f"unreadable response: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(f"connection lost: {exc}" if exc else "connection closed before the stream ended")

    # httptools callbacks

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._buffer += body
            return
        *lines, self._buffer = (self._buffer + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip())

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._finish(f"HTTP {status}: {self._buffer.decode(errors='replace')[:300]}")
        else:
            self._end_stream()

    def _on_event(self, data: bytes) -> None:
        if data == b"[DONE]":  # some servers end the stream with the connection
            self._end_stream()
            return
        event = self._decoder.decode(data)
        if event.error is not None:
            self._finish(f"error in the stream: {event.error}")
            return
        if event.usage is not None:
            self.result.prompt_tokens = event.usage.prompt_tokens
            self.result.completion_tokens = event.usage.completion_tokens
        if event.metrics is not None:
            self.result.speculation = event.metrics.speculative_decoding
        for choice in event.choices:
            text = choice.text if choice.delta is None else choice.delta.content or choice.delta.reasoning_content
            if text:
                self.result.token_times.append(time.perf_counter())
                self.result.text_parts.append(text)
            if choice.finish_reason is not None:
                self.result.finish_reason = choice.finish_reason

    def _end_stream(self) -> None:
        self._finish(None if self.result.finish_reason else "stream ended without a finish reason")

    def _finish(self, error: str | None) -> None:
        if self.done.done():
            return
        self.result.end = time.perf_counter()
        self.result.error = error
        self.done.set_result(None)
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Drops the connection in the middle of the stream, as a client that went away does."""
        self._finish("dropped by the client")
        if self._transport is not None:
            self._transport.abort()


def encode_request(
    url: str, body: dict[str, Any], api_key: str | None, further_headers: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of one HTTP/1.1 POST of ``body`` as JSON."""
    parts = urlsplit(url)
    content = msgspec.json.encode(body)
    headers = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    if api_key:
        headers.append(f"Authorization: Bearer {api_key}")
    headers += [f"{name}: {value}" for name, value in (further_headers or {}).items()]
    return "\r\n".join(headers).encode() + b"\r\n\r\n" + content


async def stream(
    url: str,
    body: dict[str, Any],
    *,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    drop_after: float | None = None,
) -> StreamResult:
    """POSTs ``body`` to ``url`` and reads the event stream to its end.

    ``drop_after`` seconds after the start the client goes away (None: never). Never raises for a server's
    failure: that is in ``StreamResult.error``.
    """
    parts = urlsplit(url)
    is_secure = parts.scheme == "https"
    loop = asyncio.get_running_loop()
    request = encode_request(url, body, api_key, headers)
    start = time.perf_counter()
    try:
        _, protocol = await loop.create_connection(
            lambda: _StreamProtocol(request),
            parts.hostname or "",
            parts.port or (443 if is_secure else 80),
            ssl=is_secure or None,
        )
    except OSError as error:
        return StreamResult(start=start, end=time.perf_counter(), error=f"cannot connect: {error}")
    protocol.result.start = start
    try:
        await asyncio.wait_for(asyncio.shield(protocol.done), drop_after or REQUEST_TIMEOUT)
    except TimeoutError:
        protocol.abort()
        if drop_after is None:
            protocol.result.error = f"no end after {REQUEST_TIMEOUT:.0f} s"
    return protocol.result
