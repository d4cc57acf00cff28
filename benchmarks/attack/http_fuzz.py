"""Broken HTTP on raw sockets, with a key and without, while another tenant asks for 4 tokens."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import COMPLETIONS, FOUR_TOKENS, ask, victim, victim_figures
from benchmarks.attack.server import ATTACKER, Server, serving

_CLIENTS = 4
_READ_SECONDS = 0.3
_SETTLE_SECONDS = 12.0
"""The server gives a request's headers ten seconds to arrive."""
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_RESET = struct.pack("ii", 1, 0)
BARS = {
    "server_errors": exactly(0),
    "tracebacks": exactly(0),
    "victim_longest_seconds": at_most(1),
    "victim_unserved": exactly(0),
    "api_mb_grown": at_most(50),
    "descriptors_left": at_most(10),
}


class BrokenRequests:
    """Makes one byte string after another that is almost HTTP; the same ``seed`` makes the same ones."""

    def __init__(self, seed: int, key: str) -> None:
        self._chance = random.Random(seed)
        self._key = key
        self._kinds: tuple[Callable[[], bytes], ...] = (
            self._mutated, self._chunked, self._pipelined, self._wrong_length, self._huge_headers,
            self._behind_a_stream, self._noise, self._broken_json,
        )  # fmt: skip

    def next(self) -> bytes:
        return self._chance.choice(self._kinds)()

    def _request(self, body: bytes = b"", headers: str = "", stream: bool = False) -> bytes:
        """A good request, but for what is given; every other one has a key."""
        body = body or json.dumps({**FOUR_TOKENS, "max_tokens": 1, "stream": stream}).encode()
        key = f"Authorization: Bearer {self._key}\r\n" if self._chance.random() < 0.5 or stream else ""
        headers = headers or f"Content-Length: {len(body)}\r\n"
        return f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{key}{headers}\r\n".encode("latin-1") + body

    def _mutated(self) -> bytes:
        content = bytearray(self._request())
        for _ in range(self._chance.randint(1, 8)):
            place = self._chance.randrange(len(content))
            piece = self._chance.choice(
                (b"\0", b"\r", b"\n", b"\r\n", b" ", b":", b"\xff", b"\t", b"", b"%00", b"\x7f")
            )
            content[place : place + self._chance.randint(0, 2)] = piece
        return bytes(content)

    def _chunked(self) -> bytes:
        sizes = (
            "0",
            "1",
            "5",
            "-1",
            "ffffffffffffffff",
            "fffffffffffffffff",
            "0x5",
            " 5",
            "5;a=b",
            "5;" + "x" * 9000,
            "",
            "g",
        )
        body = b""
        for _ in range(self._chance.randint(1, 6)):
            end = self._chance.choice((b"\r\n", b"\n", b"\r", b""))
            body += self._chance.choice(sizes).encode() + end + b"a" * self._chance.choice((0, 1, 5, 6)) + end
        body += self._chance.choice((b"", b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0\r\n" + b"T: x\r\n" * 2000))
        coding = self._chance.choice(
            ("chunked", "Chunked", "gzip, chunked", "chunked, chunked", "identity", "chunked\r\nContent-Length: 5")
        )
        return self._request(body, f"Transfer-Encoding: {coding}\r\n")

    def _pipelined(self) -> bytes:
        content = b"".join(self._request() for _ in range(self._chance.randint(2, 12)))
        return content[: self._chance.choice((len(content), self._chance.randrange(len(content))))]

    def _wrong_length(self) -> bytes:
        lengths = ("0", "1", "5000", "-1", "+5", "99999999999999999999", "5, 5", "5\r\nContent-Length: 6", "0x10", "")
        return self._request(headers=f"Content-Length: {self._chance.choice(lengths)}\r\n")

    def _huge_headers(self) -> bytes:
        headers = self._chance.choice(
            ("X: " + "a" * 70_000 + "\r\n", "X: a\r\n" * 9000, "X" * 70_000, "X: a\r\n" * 150)
        )
        return self._request(headers=f"{headers}Content-Length: 2\r\n")

    def _behind_a_stream(self) -> bytes:
        second = self._request()
        return self._request(stream=True) + second[: self._chance.randrange(1, len(second))]

    def _noise(self) -> bytes:
        return self._chance.randbytes(self._chance.choice((1, 10, 1000, 100_000)))

    def _broken_json(self) -> bytes:
        content = bytearray(json.dumps({**FOUR_TOKENS, "max_tokens": 1}).encode())
        for _ in range(self._chance.randint(1, 4)):
            content[self._chance.randrange(len(content))] = self._chance.randrange(256)
        return self._request(bytes(content))


class Exchange:
    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._chance = random.Random(seed)
        self._requests = BrokenRequests(seed, server.keys[ATTACKER])
        self.statuses: Counter[int] = Counter()
        self.sent = 0

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.sent += 1
            with suppress(OSError):
                self._connection(self._requests.next())

    def _connection(self, content: bytes) -> None:
        """Send it in pieces, perhaps not all of it; then reset, half close or read."""
        ending = self._chance.choice(("reset", "half", "read", "read"))
        if ending == "reset":
            content = content[: self._chance.randint(1, len(content))]
        with socket.create_connection(self._server.address, timeout=_READ_SECONDS) as connection:
            size = self._chance.choice((1 << 20, 1000, 1 + len(content) // 4))
            for start in range(0, len(content), size):
                connection.sendall(content[start : start + size])
            if ending == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                return
            if ending == "half":
                connection.shutdown(socket.SHUT_WR)
            self.statuses.update(int(status) for status in _STATUS.findall(_read(connection)))


def _read(connection: socket.socket) -> bytes:
    """All that comes until the server closes, or is silent for some time."""
    parts = []
    with suppress(OSError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def run(source: Path, seconds: float, seed: int) -> dict[str, float]:
    """Four clients that break HTTP, each with a seed of its own."""
    with serving(source, "http-fuzz") as server:
        ask(server, ATTACKER, FOUR_TOKENS)
        exchanges = [Exchange(server, seed * _CLIENTS + number) for number in range(_CLIENTS)]
        exchanges[0].run(2)
        memory, descriptors = server.api_mb(), server.num_descriptors()
        with victim(server, time.monotonic() + seconds + 60) as answers, ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(lambda exchange: exchange.run(seconds), exchanges))
        time.sleep(_SETTLE_SECONDS)
        statuses = sum((exchange.statuses for exchange in exchanges), Counter[int]())
        return {
            **victim_figures(answers),
            "connections": sum(exchange.sent for exchange in exchanges),
            "answers": sum(statuses.values()),
            "server_errors": sum(count for status, count in statuses.items() if status >= 500 and status != 503),
            "tracebacks": server.tracebacks(),
            "api_mb_grown": server.api_mb() - memory,
            "descriptors_left": server.num_descriptors() - descriptors,
        }
