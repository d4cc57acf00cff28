"""What a client can send is bounded, over real sockets: heads, bodies, what follows them, and connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
from typing import Any

import pytest
from structlog.testing import capture_logs

from evospec.server import http_protocol
from evospec.server.connections import REFUSED
from evospec.server.http_protocol import longest_body_time
from tests.integration.http_sockets import is_closed, pour, read_response, read_whole_response, serving

LIMIT = 4096
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


class Gate:
    """An application whose answers wait until ``opened``; each begins at once where ``streams``."""

    def __init__(self, streams: bool) -> None:
        self.opened, self.reached = asyncio.Event(), asyncio.Event()
        self._streams = streams

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]}
        if self._streams:
            await send(start)
            await send({"type": "http.response.body", "body": b"12345", "more_body": True})
        self.reached.set()
        await self.opened.wait()
        if not self._streams:
            await send(start)
        await send({"type": "http.response.body", "body": b"67890" if self._streams else b"1234567890"})


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * LIMIT,
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * LIMIT,
        b"GET /" + b"x" * LIMIT,
    ],
)
async def test_a_head_without_end_is_refused(head: bytes) -> None:
    async with serving(max_header_bytes=LIMIT) as connect:
        reader, writer = await connect()
        writer.write(head)
        status, body = await read_response(reader)
        assert (status, await is_closed(reader)) == (431, True)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_what_is_no_http_gets_an_error_body() -> None:
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(b"hello\r\n\r\n")
        status, body = await read_response(reader)
        assert (status, await is_closed(reader)) == (400, True)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_bodies_of_any_length_and_many_requests_on_one_connection_pass() -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\na: " + b"x" * (LIMIT // 2) + b"\r\n"
    plain = head + b"content-length: 1000000\r\n\r\n" + b"y" * 1_000_000
    chunked = head + b"transfer-encoding: chunked\r\n\r\n" + b"8\r\nyyyyyyyy\r\n" * 20_000 + b"0\r\n\r\n"
    async with serving(max_header_bytes=LIMIT) as connect:
        reader, writer = await connect()
        for request, size in [(plain, b"1000000"), (chunked, b"160000")] * 2:
            writer.write(request)
            assert await read_response(reader) == (200, size)
        for _ in range(2):  # sent at once
            writer.write(plain + plain)
            assert [await read_response(reader), await read_response(reader)] == [(200, b"1000000")] * 2


UPGRADE = b"POST / HTTP/1.1\r\nhost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"


@pytest.mark.parametrize("behind_another", [False, True])
@pytest.mark.parametrize("place", [0, 40, UPGRADE.index(b"h2c"), len(UPGRADE) + 1, -len(GET), -len(GET) - 1])
async def test_another_protocol_is_not_changed_to_and_the_body_is_no_request(place: int, behind_another: bool) -> None:
    """Java's client asks for HTTP/2 with every first request. It may come in pieces, wherever they are cut."""
    before = GET if behind_another else b""
    request = UPGRADE + b"content-length: %d\r\n\r\n" % len(GET) + GET
    async with serving(max_header_bytes=LIMIT) as connect:
        reader, writer = await connect()
        writer.write(before + request[:place])
        await asyncio.sleep(0.05)
        writer.write(request[place:])
        if behind_another:
            assert await read_response(reader) == (200, b"0")
        assert await read_response(reader) == (200, b"%d" % len(GET))
        writer.write(GET)  # the connection goes on, with this one alone
        assert await read_response(reader) == (200, b"0")


async def test_a_head_that_asks_for_another_protocol_counts_as_any_other() -> None:
    """What surrounds its body, too; and where it closes the connection, its body is still read."""
    upgrade = UPGRADE.replace(b"Upgrade, ", b"upgrade, close, ")
    async with serving(max_header_bytes=LIMIT) as connect:
        reader, writer = await connect()
        writer.write(upgrade + b"transfer-encoding: chunked\r\n\r\n2\r\nyy\r\n0\r\n\r\n")
        assert (await read_response(reader), await is_closed(reader)) == ((200, b"2"), True)
        reader, writer = await connect()
        writer.write(UPGRADE + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\ny\r\n" * (2 * LIMIT))
        assert ((await read_response(reader))[0], await is_closed(reader)) == (431, True)
        reader, writer = await connect()
        writer.write(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert ((await read_response(reader))[0], await is_closed(reader)) == (400, True)


async def test_chunks_of_a_byte_each_are_refused_before_they_are_many() -> None:
    async with serving(max_header_bytes=LIMIT) as connect:
        reader, writer = await connect()
        writer.write(CHUNKED + b"1\r\ny\r\n" * (2 * LIMIT))
        status, body = await read_response(reader)
        assert (status, await is_closed(reader)) == (431, True)
    assert "framing" in json.loads(body)["error"]["message"]


async def test_trailers_without_end_are_cut_off() -> None:
    async with serving(max_header_bytes=LIMIT) as connect:
        reader, writer = await connect()
        writer.write(CHUNKED + b"1\r\ny\r\n0\r\na: " + b"x" * 2 * LIMIT)
        assert (await read_response(reader))[0] == 431
        assert await is_closed(reader)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"\r\n" * 100])
@pytest.mark.parametrize("before", [0, 1])
async def test_a_connection_that_sends_no_request_is_closed(sent: bytes, before: int) -> None:
    async with serving(header_timeout=0.1) as connect:
        reader, writer = await connect()
        for _ in range(before):
            writer.write(GET)
            assert await read_response(reader) == (200, b"0")
            sent = sent or b"\r\n"
        writer.write(sent)
        assert await is_closed(reader)


async def test_the_time_for_a_head_does_not_end_what_takes_long_afterwards() -> None:
    """A body may come slowly, and a further request has its own time."""
    async with serving(header_timeout=0.2) as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n1")
            await asyncio.sleep(0.4)
            writer.write(b"2")
            assert await read_response(reader) == (200, b"2")


@pytest.mark.parametrize("head", [b"POST /refused HTTP/1.1", b"GET /refused HTTP/1.1"])
async def test_an_honest_client_that_sends_all_its_body_still_sees_the_refusal(head: bytes) -> None:
    size = 3_000_000
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(head + b"\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size // 1000):
            writer.write(b"y" * 1000)
            await writer.drain()
        answer, body = await read_whole_response(reader)
        assert answer.startswith(b"http/1.1 401 ")
        assert b"\r\nconnection: close\r\n" in answer
        assert (body, await is_closed(reader)) == (b"0", True)


@pytest.mark.parametrize("data", [b"y" * 65536, b"1\r\ny\r\n" * 10_000, GET * 1000])
async def test_a_body_without_end_behind_a_refusal_is_cut_off(data: bytes) -> None:
    async with serving(max_body_bytes=100_000) as connect:
        reader, writer = await connect()
        writer.write(CHUNKED.replace(b"/ ", b"/refused ") + b"1\r\ny\r\n")
        assert (await read_response(reader))[0] == 401
        await pour(writer, data)
        assert await is_closed(reader)


async def test_a_client_that_stays_silent_behind_a_refusal_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "LINGER", 0.2)
    async with serving() as connect:
        _, writer = await connect()
        writer.write(CHUNKED.replace(b"/ ", b"/refused "))
        async with asyncio.timeout(60):
            while not writer.transport.is_closing():
                writer.write(b"1\r\ny\r\n")
                await asyncio.sleep(0.05)


async def test_a_body_that_stops_gets_a_408_and_the_application_is_told() -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()
        await send({"type": "http.response.start", "status": 500, "headers": []})  # too late: nobody sees it

    async with serving(app, body_timeout=0.1) as connect:
        reader, writer = await connect()
        writer.write(CHUNKED + b"1\r\ny\r\n")
        status, body = await read_response(reader)
        assert (status, await is_closed(reader)) == (408, True)
        await asyncio.wait_for(ended.wait(), 60)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("expects", [b"", b"expect: 100-continue\r\n"])
async def test_time_in_which_the_application_takes_nothing_is_not_the_clients(expects: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not expects:
            await receive()
        await asyncio.sleep(1)  # five times as long as a body may take
        while (message := await receive()).get("more_body"):
            pass
        status = 200 if message["type"] == "http.request" else 500
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with serving(app, body_timeout=0.2) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n" + expects + b"content-length: 1000000\r\n\r\n")
        if expects:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(b"y" * 1_000_000)
        assert await read_response(reader) == (200, b"")


class Pouring:
    """An application whose answers are more than the buffers on the way hold, whole or in pieces."""

    def __init__(self, num_bytes: int, in_pieces: bool) -> None:
        self.ended = asyncio.Event()
        self._num_bytes, self._size = num_bytes, 65536 if in_pieces else num_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % self._num_bytes)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for sent in range(self._size, self._num_bytes + 1, self._size):
            more = sent < self._num_bytes
            await send({"type": "http.response.body", "body": b"y" * self._size, "more_body": more})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.ended.set()


@pytest.mark.parametrize("in_pieces", [True, False])
async def test_a_client_that_does_not_read_its_answer_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, in_pieces: bool
) -> None:
    monkeypatch.setattr(http_protocol, "READING_TIMEOUT", 0.2)
    app = Pouring(64 * 1024**2, in_pieces)
    async with serving(app) as connect:
        reader, writer = await connect()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        hung_up = select.poll()
        hung_up.register(writer.get_extra_info("socket").fileno(), 0)
        assert await asyncio.to_thread(hung_up.poll, 20_000)
        await asyncio.wait_for(app.ended.wait(), 20)


async def test_a_client_that_reads_its_answer_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "READING_TIMEOUT", 5.0)
    num_bytes = 64 * 1024**2
    async with serving(Pouring(num_bytes, in_pieces=False)) as connect:
        reader, writer = await connect()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(32):
            await reader.readexactly(num_bytes // 32)
            await asyncio.sleep(0.2)


def test_the_time_a_body_may_take_grows_with_what_has_come_up_to_the_longest() -> None:
    assert [longest_body_time(num_bytes, 60) for num_bytes in (0, 10 * 1024, 1024**2)] == [10, 20, 60]
    assert longest_body_time(0, 5) == 5


@pytest.mark.parametrize("streams", [True, False])
async def test_what_follows_a_request_in_work_never_ends_its_answer(streams: bool) -> None:
    """Each on a server of its own, all at once: most of the time is waiting."""

    async def check(behind: bytes) -> None:
        app = Gate(streams)
        times: dict[str, Any] = {"header_timeout": 0.1, "body_timeout": 0.1, "keep_alive_timeout": 1}
        async with serving(app, max_header_bytes=LIMIT, **times) as connect:
            reader, writer = await connect()
            writer.write(GET)
            await app.reached.wait()
            writer.write(behind)
            await asyncio.sleep(0.4)  # longer than a head and a body may take
            app.opened.set()
            assert await read_response(reader) == (200, b"1234567890")
            await read_to_end(reader)

    async with asyncio.TaskGroup() as group:
        for behind in (
            b"GET / HT",
            b"GET / HTTP/1.1\r\na: " + b"x" * 3 * LIMIT,
            b"hello\r\n\r\n",
            CHUNKED + b"z\r\n",
            CHUNKED + b"1\r\ny\r\n" * 4 * LIMIT,
            GET * 1000,
        ):
            group.create_task(check(behind))


async def test_nothing_is_answered_behind_an_answer_that_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await asyncio.sleep(0)  # the server parses what follows
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async with serving(app) as connect:
        reader, writer = await connect()
        writer.write(GET + GET + b"hello\r\n\r\n")
        assert await read_response(reader) == (200, b"")
        assert await is_closed(reader)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def read_to_end(reader: asyncio.StreamReader) -> None:
    """The connection ends, and what comes before that are answers of ``Gate``, each whole."""
    rest = b""
    with contextlib.suppress(ConnectionResetError):
        while data := await reader.read(65536):
            rest += data
    answers = rest.split(b"HTTP/1.1 ")
    assert answers[0] == b""
    assert all(answer.startswith(b"200 ") and answer.endswith(b"1234567890") for answer in answers[1:])


async def test_connections_of_an_address_and_together_are_bounded() -> None:
    refused = [REFUSED.labels(limit)._value.get() for limit in ("address", "all")]
    with capture_logs() as lines:
        async with serving(max_connections=8, max_address_share=0.5) as connect:
            held = [await connect() for _ in range(4)]
            for reader, writer in held:
                writer.write(GET)
                assert await read_response(reader) == (200, b"0")
            for _ in range(20):
                reader, _ = await connect()
                assert await is_closed(reader)
            held[0][1].close()
            await held[0][1].wait_closed()
            async with asyncio.timeout(60):
                while True:  # the server has to notice the end of the other
                    reader, writer = await connect()
                    writer.write(GET)
                    try:
                        assert await read_response(reader) == (200, b"0")
                        break
                    except (asyncio.IncompleteReadError, ConnectionResetError):
                        continue
    now = [REFUSED.labels(limit)._value.get() for limit in ("address", "all")]
    assert now[0] - refused[0] >= 20
    assert now[1] == refused[1]
    assert len([line for line in lines if line["event"] == "too many connections"]) < 20
