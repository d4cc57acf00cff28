"""One tenant's long and many outputs in the engine, while another asks for the first of 4 tokens."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.attack.bars import Bar, at_most, exactly
from benchmarks.attack.clients import COMPLETIONS, FOUR_TOKENS, victim, victim_figures
from benchmarks.attack.server import ATTACKER, MODEL, Server, serving
from benchmarks.common.threads import beside

KV_BYTES = 600_000_000
_TOGETHER_SECONDS = 40.0
LIMIT_SECONDS = 120.0
_FIRST_TOKEN = {**FOUR_TOKENS, "prompt": "Hello", "max_tokens": 1}
_STREAM = {"model": MODEL, "ignore_eos": True, "temperature": 1, "stream": True}
LONG = {**_STREAM, "prompt": [f"Once upon a time {index}" for index in range(48)], "max_tokens": 8000}
MANY = {**_STREAM, "prompt": [f"Once {index}" for index in range(17)], "n": 16, "max_tokens": 300}
BARS = {
    "victim_longest_seconds": at_most(2),
    "victim_unserved": exactly(0),
    "attacker_tokens_per_second_alone": Bar(least=0.9, of_before=True),
}


def run_kv(source: Path) -> dict[str, float]:
    """48 prompts of 8,000 tokens each, in room for some 26,000."""
    with serving(source, "kv", "--kv-max-bytes", str(KV_BYTES)) as server:
        return _starve(server, LONG, alone_seconds=40)


def run_slots(source: Path) -> dict[str, float]:
    """17 prompts of 16 sequences of 300 tokens each, which is more than there are slots."""
    with serving(source, "slots") as server:
        return _starve(server, MANY, alone_seconds=24)


def _starve(server: Server, body: Mapping[str, Any], alone_seconds: float) -> dict[str, float]:
    """The attacker alone, for its speed, and then with the victim beside it."""
    with open_stream(server, ATTACKER, body):
        time.sleep(alone_seconds / 4)
        tokens, start = _tokens(server), time.monotonic()
        time.sleep(3 * alone_seconds / 4)
        speed = (_tokens(server) - tokens) / (time.monotonic() - start)
        with victim(server, time.monotonic() + LIMIT_SECONDS, _FIRST_TOKEN) as answers:
            time.sleep(_TOGETHER_SECONDS)
        figures = {**victim_figures(answers), "preemptions": server.metric("evospec:preemptions_total")}
    return {**figures, "attacker_tokens_per_second_alone": speed}


def _tokens(server: Server) -> float:
    return server.metric("evospec:generation_tokens_total", tenant=ATTACKER)


@contextmanager
def open_stream(server: Server, tenant: str, body: Mapping[str, Any]) -> Iterator[None]:
    """A streamed request that is read as long as the block lasts, and then dropped."""
    content = json.dumps(body).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.keys[tenant]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(server.address, timeout=LIMIT_SECONDS) as connection:
        connection.sendall(head.encode() + content)

        def read(_: threading.Event) -> None:
            with suppress(OSError):
                while connection.recv(1 << 20):
                    pass

        with beside(read):
            try:
                yield
            finally:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
