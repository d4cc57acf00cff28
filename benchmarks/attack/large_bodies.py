"""Bodies as large as allowed, of every kind, by one tenant, while another asks for little and health is asked for."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import CHAT, COMPLETIONS, Victim
from benchmarks.attack.server import ATTACKER, MODEL, Server, serving
from benchmarks.attack.tokenize_flood import TOKENIZE, TWO_WORDS, most_memory

_BYTES = 4 * 1024**2 - 1024
_AT_ONCE = 4
_SECONDS = 1.5
_LIMIT_SECONDS = 60.0
BARS = {
    "health_longest_seconds": at_most(0.1),
    "victim_longest_seconds": at_most(0.5),
    "victim_unserved": exactly(0),
    "api_mb_most": at_most(500),
}


def run(source: Path) -> dict[str, float]:
    """Each kind from four connections for a second and a half; the longest answer of health to each kind."""
    figures: dict[str, float] = {}
    with (
        serving(source, "large-bodies") as server,
        most_memory(server) as most,
        Victim(server, time.monotonic() + _LIMIT_SECONDS, body=TWO_WORDS, path=TOKENIZE) as victim,
    ):
        for kind, (path, body) in bodies().items():
            with _health(server) as times:
                _send(server, path, body.encode())
            figures[f"{kind}_health_seconds"] = max(times)
    return {
        "health_longest_seconds": max(figures.values()),
        **figures,
        **victim.figures(),
        "api_mb_most": most[0],
    }


def bodies() -> dict[str, tuple[str, str]]:
    """Path and body of each kind."""
    prompt = '{{"model":"{}","prompt":{}}}'.format
    option = '{{"model":"{}","prompt":"a",{}}}'.format
    chat = '{{"model":"{}","messages":[{}]}}'.format
    schema = '"response_format":{{"type":"json_schema","json_schema":{{"name":"a","schema":{}}}}}'.format
    fields = _filled(f'"k{index}":1' for index in range(10**6))
    numbers = ",".join(["12345"] * 8000)
    return {
        "string": (COMPLETIONS, prompt(MODEL, '"' + "a" * _BYTES + '"')),
        "escapes": (COMPLETIONS, prompt(MODEL, '"' + r"\n" * (_BYTES // 2) + '"')),
        "ids": (COMPLETIONS, prompt(MODEL, f"[{_repeated('12345')}]")),
        "id_lists": (COMPLETIONS, prompt(MODEL, f"[{_repeated(f'[{numbers}]')}]")),
        "strings": (COMPLETIONS, prompt(MODEL, "[" + _repeated('"a"') + "]")),
        "lists": (COMPLETIONS, prompt(MODEL, f"[{_repeated('[]')}]")),
        "deep_lists": (COMPLETIONS, prompt(MODEL, f"[{_repeated('[' * 400 + ']' * 400)}]")),
        "broken_lists": (COMPLETIONS, prompt(MODEL, f"[{_repeated('[]')}")),
        "biases": (COMPLETIONS, option(MODEL, f'"logit_bias":{{{fields}}}')),
        "unknown_fields": (COMPLETIONS, option(MODEL, fields)),
        "schema": (COMPLETIONS, option(MODEL, schema(f"{{{fields}}}"))),
        "schema_choices": (COMPLETIONS, option(MODEL, schema(f'{{"enum":[{_repeated("1")}]}}'))),
        "messages": (CHAT, chat(MODEL, _repeated('{"role":"user","content":"a"}'))),
        "parts": (CHAT, chat(MODEL, '{"role":"user","content":[' + _repeated('{"type":"text","text":"a"}') + "]}")),
        "parsed": (CHAT, chat(MODEL, f'{{"role":"user","content":"a","parsed":{{{fields}}}}}')),
        "tokens": ("/detokenize", '{"tokens":[' + ",".join(["12345"] * 2**17) + "]}"),
    }


def _repeated(item: str) -> str:
    """``item`` as often as a body has room for it, separated by commas."""
    return _filled(repeat(item))


def _filled(items: Iterable[str]) -> str:
    """As many of ``items`` as a body has room for, separated by commas."""
    taken, size = [], 0
    for item in items:
        size += len(item) + 1
        if size > _BYTES:
            break
        taken.append(item)
    return ",".join(taken)


def _send(server: Server, path: str, body: bytes) -> None:
    end = time.monotonic() + _SECONDS
    headers = {"Authorization": f"Bearer {server.keys[ATTACKER]}", "Content-Type": "application/json"}

    def send() -> None:
        while time.monotonic() < end:
            connection = http.client.HTTPConnection(*server.address, timeout=_LIMIT_SECONDS)
            with suppress(OSError, http.client.HTTPException):
                connection.request("POST", path, body, headers)
                connection.getresponse().read()
            connection.close()

    clients = [threading.Thread(target=send, daemon=True) for _ in range(_AT_ONCE)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


@contextmanager
def _health(server: Server) -> Iterator[list[float]]:
    """Seconds that each answer of ``/health`` takes as long as the block lasts."""
    times, stopping = [0.0], threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection(*server.address, timeout=_LIMIT_SECONDS)
        while not stopping.wait(0.005):
            start = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            times.append(time.perf_counter() - start)
        connection.close()

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    try:
        yield times
    finally:
        stopping.set()
        asker.join()
