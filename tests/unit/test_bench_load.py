"""The load generator against a small HTTP server of our own on a loopback port."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.server.bench.load import LoadOptions, percentiles, request_body, run_load, summarise
from evospec.server.bench.stream import StreamResult, stream

Answer = Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]

PROMPTS = [[{"role": "user", "content": f"prompt {i}"}] for i in range(5)]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(content: str | None = None, finish: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    body = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}}
    return b"data: " + json.dumps(body).encode() + b"\n\ndata: [DONE]\n\n"


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@dataclass
class Server:
    """Answers every request with ``answer``; counts what it saw."""

    answer: Answer
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    open_now: int = 0
    most_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        )
        self.bodies.append(json.loads(await reader.readexactly(length)))
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            await self.answer(writer)
        finally:
            self.open_now -= 1
            writer.close()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener:
        yield server


def sends(data: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def options(url: str, **changes: Any) -> LoadOptions:
    return replace(LoadOptions(url=url, model="m", concurrency=2, num_requests=6, max_tokens=7), **changes)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 4096])
async def test_tokens_come_from_usage_and_text_survives_any_split(size: int) -> None:
    body = event("") + event("Zürich ") + event("東京 🎉") + event(finish="length") + usage(9)
    async with serving(sends(HEAD + chunked(body, size))) as server:
        result = await stream(f"{server.url}/v1/chat/completions", {"model": "m"})
    assert result.error is None
    assert result.text == "Zürich 東京 🎉"
    assert (result.prompt_tokens, result.completion_tokens, result.finish_reason) == (3, 9, "length")
    assert len(result.token_times) == 2
    assert result.start <= result.token_times[0] <= result.token_times[1] <= result.end


async def test_plain_completions_are_read_too() -> None:
    text = b'data: {"choices": [{"index": 0, "text": "ab", "finish_reason": "stop"}]}\n\n'
    async with serving(sends(HEAD + chunked(text + usage(1), 50))) as server:
        result = await stream(f"{server.url}/v1/completions", {"model": "m"})
    assert (result.error, result.text) == (None, "ab")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'HTTP/1.1 503 Busy\r\nContent-Length: 11\r\n\r\n{"error":1}', "HTTP 503"),
        (HEAD + chunked(event("a"), 99), "without a finish reason"),
        (HEAD + b"5\r\ndata:", "closed before the stream ended"),
        (HEAD + chunked(event("a") + b'data: {"error": {"message": "engine gone"}}\n\n', 99), "engine gone"),
        (HEAD + chunked(b"data: {nonsense\n\n", 99), "unreadable"),
        (b"no http at all\r\n\r\n", "unreadable"),
    ],
)
async def test_failures_are_reported(answer: bytes, message: str) -> None:
    async with serving(sends(answer)) as server:
        result = await stream(f"{server.url}/v1/chat/completions", {"model": "m"})
    assert result.error is not None
    assert message in result.error


async def test_nobody_listening_is_an_error() -> None:
    async with serving(sends(b"")) as server:
        url = server.url
    result = await stream(f"{url}/v1/chat/completions", {})
    assert result.error is not None
    assert "cannot connect" in result.error


async def test_a_client_that_drops_closes_the_connection() -> None:
    closed = asyncio.Event()

    async def until_gone(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        with suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"%x\r\n%b\r\n" % (len(event("b")), event("b")))
                await writer.drain()
                await asyncio.sleep(0.01)
        closed.set()

    async with serving(until_gone) as server:
        result = await stream(f"{server.url}/v1/chat/completions", {}, drop_after=0.1)
        await asyncio.wait_for(closed.wait(), 10)
    assert result.error == "dropped by the client"
    assert result.text.startswith("b")


async def test_load_keeps_to_concurrency_and_number_of_requests() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.01)
        writer.write(HEAD + chunked(event("a") + event("b", "length") + usage(7), 64))

    async with serving(answer) as server:
        report, results = await run_load(options(server.url, warmup_requests=2, warmup_tokens=1), PROMPTS)
    assert server.most_open == 2
    assert [body["max_tokens"] for body in server.bodies] == [1] * 2 + [7] * 6
    assert [body["messages"] for body in server.bodies[2:]] == [*PROMPTS, PROMPTS[0]]
    assert (report.requests, report.errors, report.output_tokens, report.prompt_tokens) == (6, 0, 42, 18)
    assert report.tokens_per_event == 3.5
    assert report.tokens_per_second == pytest.approx(42 / report.seconds)
    assert len(results) == 6


async def test_no_request_starts_after_the_time_is_up() -> None:
    async with serving(sends(HEAD + chunked(event("a", "length") + usage(1), 64))) as server:
        report, _ = await run_load(options(server.url, num_requests=10_000, max_seconds=0.2), PROMPTS)
    assert 0 < report.requests < 10_000


async def test_failed_requests_count_as_nothing_else() -> None:
    answers = iter(
        [HEAD + chunked(event("a", "length") + usage(7), 64), b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"]
    )

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(next(answers))

    async with serving(answer) as server:
        report, _ = await run_load(options(server.url, concurrency=1, num_requests=2), PROMPTS)
    assert (report.requests, report.errors, report.output_tokens) == (2, 1, 7)
    assert report.error_messages == ["HTTP 500: "]


def test_times_are_those_of_the_streams() -> None:
    result = StreamResult(
        start=10.0, end=12.0, token_times=[10.5, 10.6, 11.0], completion_tokens=6, finish_reason="stop"
    )
    report = summarise([result, StreamResult(start=0.0, error="gone")], seconds=2.0, cpu_seconds=0.6)
    assert report.ttft.p50 == pytest.approx(0.5)
    assert report.itl.p50 == pytest.approx(0.1)
    assert report.itl.p99 == pytest.approx(0.4)
    assert report.tpot.p50 == pytest.approx(0.1)
    assert report.tokens_per_second == 3.0
    assert report.client_cpu_per_token == pytest.approx(0.1)


def test_options_reach_the_body() -> None:
    url, body = request_body(options("http://x", ignore_eos=False, temperature=0.5), PROMPTS[0])
    assert url == "http://x/v1/chat/completions"
    assert body["temperature"] == 0.5
    assert "ignore_eos" not in body
    url, body = request_body(options("http://x", chat=False), PROMPTS[0])
    assert (url, body["prompt"], body["ignore_eos"]) == ("http://x/v1/completions", "prompt 0", True)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_values_with_enough_below(values: list[float]) -> None:
    result = percentiles(values)
    for share, value in ((0.5, result.p50), (0.9, result.p90), (0.99, result.p99)):
        assert value in values
        assert sum(other <= value for other in values) >= share * len(values)
        assert sum(other < value for other in values) < share * len(values)


def test_percentiles_of_nothing_are_not_numbers() -> None:
    assert math.isnan(percentiles([]).p50)
