"""A body with a key that stops in the middle, when the server is told to end."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import psutil

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import FOUR_TOKENS, ask
from benchmarks.attack.server import ATTACKER, VICTIM, serving

_LIMIT_SECONDS = 90.0
BARS = {"exit_seconds": at_most(10), "tracebacks": exactly(0)}


def run(source: Path) -> dict[str, float]:
    with serving(source, "drain") as server:
        ask(server, VICTIM, FOUR_TOKENS)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.keys[ATTACKER]}\r\n"
        with socket.create_connection(server.address) as connection:
            connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"model": '.encode())
            time.sleep(1)
            start = time.monotonic()
            server.process.terminate()
            try:
                server.process.wait(_LIMIT_SECONDS)
            except psutil.TimeoutExpired:
                server.process.kill()
        return {"exit_seconds": time.monotonic() - start, "tracebacks": server.tracebacks()}
