"""Bodies of clients without a key: endless ones, and three hundred that come at one byte a second."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import ask
from benchmarks.attack.server import LIMITED, MODEL, REQUESTS_PER_MINUTE, Server, serving
from benchmarks.common.process import fetch
from benchmarks.common.threads import beside
from evospec.server.bench.load import percentiles

_CONNECTIONS = (1, 2, 4)
_REQUESTS, _AT_ONCE = 60, 20
_SLOW = 300
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
_CHUNKS = b"1\r\na\r\n" * 40_000
_RECONNECT_SECONDS = 0.01
_PROBE_SECONDS, _PROBE_TIMEOUT = 20.0, 30.0
BARS = {
    **{f"admitted_beside_{count}_endless": exactly(REQUESTS_PER_MINUTE) for count in _CONNECTIONS},
    "health_p99_seconds": at_most(0.1),
    "health_unserved": exactly(0),
    "api_mb_grown": at_most(50),
    "descriptors_left": at_most(32),
}
"""Connections to Redis that requests of limited tenants have opened are kept."""


def run(source: Path) -> dict[str, float]:
    """All on one server, whose memory and descriptors are compared before and after."""
    figures: dict[str, float] = {}
    with serving(source, "keyless") as server:
        probe(server, 2)
        memory, descriptors = server.api_mb(), server.num_descriptors()
        for count, tenant in zip(_CONNECTIONS, LIMITED, strict=True):
            with endless_bodies(server, count):
                time.sleep(2)
                admitted, seconds = _burst(server, tenant)
            figures |= {f"admitted_beside_{count}_endless": admitted, f"seconds_beside_{count}_endless": seconds}
        with endless_bodies(server, 4), slow_bodies(server, _SLOW):
            figures |= probe(server, _PROBE_SECONDS)
            during = server.api_mb()
        time.sleep(2)
        return figures | {
            "api_mb_before": memory,
            "api_mb_during": during,
            "api_mb_grown": max(during, server.api_mb()) - memory,
            "descriptors_left": server.num_descriptors() - descriptors,
        }


def _burst(server: Server, tenant: str) -> tuple[float, float]:
    """How many of 60 requests were admitted, and how long they all took."""
    start = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        body = {"model": MODEL, "prompt": "hi"}
        answers = list(pool.map(lambda _: ask(server, tenant, body, "/tokenize"), range(_REQUESTS)))
    return Counter(answer.status for answer in answers)[200], time.monotonic() - start


def probe(server: Server, seconds: float) -> dict[str, float]:
    """Times of ``/health``, asked again and again on new connections."""
    times, unserved = [], 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        try:
            fetch(f"{server.url}/health", timeout=_PROBE_TIMEOUT)
        except (OSError, http.client.HTTPException):
            unserved += 1
        times.append(time.perf_counter() - start)
        time.sleep(0.05)
    shares = percentiles(times)
    return {"health_p50_seconds": shares.p50, "health_p99_seconds": shares.p99, "health_unserved": unserved}


def endless_bodies(server: Server, count: int) -> AbstractContextManager[None]:
    """``count`` connections that send chunks as fast as they are taken, each opened again when it is closed."""

    def push(stopping: threading.Event) -> None:
        with socket.create_connection(server.address, timeout=5) as connection:
            connection.sendall(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            while not stopping.is_set():
                connection.sendall(_CHUNKS)

    return _again_and_again(push, count)


def slow_bodies(server: Server, count: int) -> AbstractContextManager[None]:
    """``count`` connections that send one byte a second of a body of 100 GB, each opened again when it is closed."""

    def trickle(stopping: threading.Event) -> None:
        with ExitStack() as stack:
            connections: list[socket.socket] = []
            while not stopping.is_set():
                while len(connections) < count:
                    connection = stack.enter_context(socket.create_connection(server.address, timeout=5))
                    connection.sendall(_HEAD + b"Content-Length: 100000000000\r\n\r\n")
                    connections.append(connection)
                connections = [connection for connection in connections if _sends_a_byte(connection)]
                stopping.wait(1)

    return _again_and_again(trickle)


def _sends_a_byte(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"a")
    except OSError:
        connection.close()
        return False
    return True


def _again_and_again(work: Callable[[threading.Event], None], count: int = 1) -> AbstractContextManager[None]:
    """``work`` in threads of its own, begun anew when the server ends it, as long as the block lasts."""

    def repeat(stopping: threading.Event) -> None:
        while not stopping.wait(_RECONNECT_SECONDS):
            with suppress(OSError):
                work(stopping)

    return beside(repeat, count)
