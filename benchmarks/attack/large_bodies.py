"""Bodies as large as allowed, of every kind, by one tenant, while another asks for little and health is asked for."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import CHAT, COMPLETIONS, victim, victim_figures
from benchmarks.attack.server import MODEL, Server, serving
from benchmarks.attack.tokenize_flood import PAGE, TOKENIZE, flood, most_memory
from benchmarks.common.threads import beside

_BYTES = 4 * 1024**2 - 1024
AT_ONCE = 4
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
    health: dict[str, float] = {}
    answers: dict[str, float] = {}
    with (
        serving(source, "large-bodies") as server,
        most_memory(server) as most,
        victim(server, time.monotonic() + _LIMIT_SECONDS, PAGE, TOKENIZE) as of_victim,
    ):
        for kind, (path, body) in bodies().items():
            with _health(server) as times:
                statuses = flood(server, path, body.encode(), AT_ONCE, _SECONDS)
            health[f"{kind}_health_seconds"] = max(times)
            answers |= {f"{kind}_attacker_{status}": count for status, count in sorted(statuses.items())}
    return {
        "health_longest_seconds": max(health.values()),
        **health,
        **answers,
        **victim_figures(of_victim),
        "api_mb_most": most[0],
    }


def bodies() -> dict[str, tuple[str, str]]:
    """Path and body of each kind."""
    fields = "{" + ",".join(f'"k{index:06}":1' for index in range(_BYTES // 12)) + "}"
    schema = '"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":'
    prompts = {
        "string": f'"{"a" * _BYTES}"',
        "escapes": '"' + "\\n" * (_BYTES // 2) + '"',
        "ids": _list_of("12345"),
        "id_lists": _list_of(_list_of("12345", 8191 * 6), 63 * 8191 * 6),
        "strings": _list_of('"a"'),
        "lists": _list_of("[]"),
        "deep_lists": _list_of("[" * 400 + "]" * 400),
        "broken_lists": _list_of("[]")[:-1],
    }
    options = {
        "biases": f'"logit_bias":{fields}',
        "unknown_fields": fields[1:-1],
        "schema": schema + fields + "}}",
        "schema_choices": schema + '{"enum":' + _list_of("1") + "}}}",
    }
    messages = {
        "messages": _list_of('{"role":"user","content":"a"}'),
        "parts": '[{"role":"user","content":' + _list_of('{"type":"text","text":"a"}') + "}]",
        "parsed": '[{"role":"user","content":"a","parsed":' + fields + "}]",
    }
    model = f'"model":"{MODEL}"'
    return {
        **{kind: (COMPLETIONS, f'{{{model},"prompt":{prompt}}}') for kind, prompt in prompts.items()},
        **{kind: (COMPLETIONS, f'{{{model},"prompt":"a",{option}}}') for kind, option in options.items()},
        **{kind: (CHAT, f'{{{model},"messages":{items}}}') for kind, items in messages.items()},
        "tokens": ("/detokenize", '{"tokens":' + _list_of("12345", 2**17 * 6) + "}"),
    }


def _list_of(item: str, size: int = _BYTES) -> str:
    """A list of as many items as fit in about so many bytes."""
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


@contextmanager
def _health(server: Server) -> Iterator[list[float]]:
    """Seconds that each answer of ``/health`` takes as long as the block lasts."""
    times = [0.0]

    def ask(stopping: threading.Event) -> None:
        connection = http.client.HTTPConnection(*server.address, timeout=_LIMIT_SECONDS)
        while not stopping.wait(0.005):
            start = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            times.append(time.perf_counter() - start)
        connection.close()

    with beside(ask):
        yield times
