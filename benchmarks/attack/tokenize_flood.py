"""One tenant has megabytes of text tokenised again and again, while another asks for the tokens of a page."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import post, victim, victim_figures
from benchmarks.attack.server import ATTACKER, MODEL, Server, serving
from benchmarks.common.threads import beside

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
            with victim(server, time.monotonic() + _LIMIT_SECONDS, PAGE, TOKENIZE) as answers:
                statuses = flood(server, TOKENIZE, body, AT_ONCE, _SECONDS)
            figures |= {f"{kind}_{name}": value for name, value in victim_figures(answers).items()}
            figures |= {f"{kind}_attacker_{status}": count for status, count in sorted(statuses.items())}
    return {**figures, "api_mb_most": most[0]}


def flood(server: Server, path: str, body: bytes, at_once: int, seconds: float) -> Counter[int]:
    """The attacker's answers by status: ``at_once`` clients that send ``body`` again and again for ``seconds``.

    Status 0: none came.
    """
    end, statuses = time.monotonic() + seconds, Counter[int]()

    def send(_: int) -> None:
        while time.monotonic() < end:
            status = 0
            with suppress(OSError, http.client.HTTPException):
                status = post(server, ATTACKER, body, path, _LIMIT_SECONDS)[0]
            statuses[status] += 1

    with ThreadPoolExecutor(at_once) as clients:
        list(clients.map(send, range(at_once)))
    return statuses


@contextmanager
def most_memory(server: Server) -> Iterator[list[float]]:
    """A list whose one entry is the most resident megabytes of the API process since the block began."""
    most = [server.api_mb()]

    def watch(stopping: threading.Event) -> None:
        while not stopping.wait(0.02):
            most[0] = max(most[0], server.api_mb())

    with beside(watch):
        yield most
