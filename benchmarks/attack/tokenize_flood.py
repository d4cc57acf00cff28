"""One tenant has megabytes of text tokenised again and again, while another asks for the tokens of a page."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import Victim
from benchmarks.attack.server import ATTACKER, MODEL, Server, serving

TOKENIZE = "/tokenize"
PAGE = {"model": MODEL, "prompt": "Hello there, " * 500}
AT_ONCE = 24
_CHARACTERS = 663_000
"""As many as the longest tokens of the model need to fill its context: what is refused by its length is longer."""
TEXTS = {
    "emoji": "\U0001f600" * _CHARACTERS,
    "spaces": " " * _CHARACTERS,
    "letters": "qxzj" * 24_000,
    "words": "the quick brown fox jumps over a lazy dog " * 4_000,
}
_SECONDS = 6.0
_LIMIT_SECONDS = 120.0
BARS = {
    **{f"{kind}_victim_longest_seconds": at_most(0.5) for kind in TEXTS},
    **{f"{kind}_victim_unserved": exactly(0) for kind in TEXTS},
    "api_mb_most": at_most(500),
}


def run(source: Path) -> dict[str, float]:
    """24 bodies at a time of each kind, for six seconds and until the last is answered."""
    figures: dict[str, float] = {}
    with serving(source, "tokenize-flood") as server, most_memory(server) as most:
        for kind, text in TEXTS.items():
            body = json.dumps({"model": MODEL, "prompt": text}, ensure_ascii=False).encode()
            with Victim(server, time.monotonic() + _LIMIT_SECONDS, body=PAGE, path=TOKENIZE) as victim:
                statuses = flood(server, TOKENIZE, body, AT_ONCE, _SECONDS)
            figures |= {f"{kind}_{name}": value for name, value in victim.figures().items()}
            figures |= {f"{kind}_attacker_{status}": count for status, count in sorted(statuses.items())}
    return {**figures, "api_mb_most": most[0]}


def flood(server: Server, path: str, body: bytes, at_once: int, seconds: float) -> Counter[int]:
    """The attacker's answers by status: ``at_once`` clients that send ``body`` again and again for ``seconds``.

    Status 0: none came.
    """
    end, statuses = time.monotonic() + seconds, Counter[int]()
    headers = {"Authorization": f"Bearer {server.keys[ATTACKER]}", "Content-Type": "application/json"}

    def send() -> None:
        while time.monotonic() < end:
            connection, status = http.client.HTTPConnection(*server.address, timeout=_LIMIT_SECONDS), 0
            with suppress(OSError, http.client.HTTPException):
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                response.read()
                status = response.status
            connection.close()
            statuses[status] += 1

    clients = [threading.Thread(target=send, daemon=True) for _ in range(at_once)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return statuses


@contextmanager
def most_memory(server: Server) -> Iterator[list[float]]:
    """A list whose one entry is the most resident megabytes of the API process since the block began."""
    most, stopping = [server.api_mb()], threading.Event()

    def watch() -> None:
        while not stopping.wait(0.02):
            most[0] = max(most[0], server.api_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        stopping.set()
        watcher.join()
