"""Random schemas of one tenant, a few at a time, while another asks for 4 tokens without a schema."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import FOUR_TOKENS, Answer, ask, victim, victim_figures, with_schema
from benchmarks.attack.random_schemas import RandomSchemas
from benchmarks.attack.server import ATTACKER, MODEL, Server, serving

_CLIENTS = 4
_TIMEOUT = 60.0
BODY = {"model": MODEL, "prompt": "zq", "max_tokens": 24, "temperature": 2}
_LONG_STEP = "0.1"
"""Seconds, as the histogram of step times writes them."""
_CONTROL_SHARE = 0.25
_CHECK_SECONDS = 1.0
BARS = {
    "long_steps_more_than_without": at_most(0),
    "victim_longest_seconds": at_most(1),
    "victim_unserved": exactly(0),
    "against_their_schema": exactly(0),
    "failed": exactly(0),
}


def run(source: Path, seconds: float, seed: int) -> dict[str, float]:
    """The same load without schemas for a quarter of the time, then with."""
    schemas = RandomSchemas(seed)
    with serving(source, "grammar-fuzz") as server:
        ask(server, ATTACKER, FOUR_TOKENS)
        without = _load(server, seconds * _CONTROL_SHARE, lambda: None)
        figures = _load(server, seconds, schemas.next)
    more = figures["long_steps"] - without["long_steps"]
    return {
        **figures,
        "victim_longest_seconds_without": without["victim_longest_seconds"],
        "long_steps_without": without["long_steps"],
        "long_steps_more_than_without": more,
    }


def _load(server: Server, seconds: float, next_schema: Callable[[], dict[str, Any] | None]) -> dict[str, float]:
    lock, end = threading.Lock(), time.monotonic() + seconds

    def send(_: int) -> list[tuple[dict[str, Any] | None, Answer]]:
        asked = []
        while time.monotonic() < end:
            with lock:
                schema = next_schema()
            body = BODY if schema is None else with_schema(BODY, schema)
            asked.append((schema, ask(server, ATTACKER, body, timeout=_TIMEOUT)))
        return asked

    before = _long_steps(server)
    with victim(server, end + _TIMEOUT) as of_victim, ThreadPoolExecutor(_CLIENTS) as clients:
        asked = list(chain.from_iterable(clients.map(send, range(_CLIENTS))))
    counts = Counter(judge(answer) for _, answer in asked)
    long_steps = _long_steps(server) - before
    checked = _check(asked)
    return {
        **victim_figures(of_victim),
        **{name: counts[name] for name in ("served", "cut_short", "refused", "failed")},
        "as_their_schema": checked[True],
        "against_their_schema": checked[False],
        "long_steps": long_steps,
    }


def _check(asked: Iterable[tuple[dict[str, Any] | None, Answer]]) -> Counter[bool | None]:
    """How many whole answers fit their schemas; those that do not are shown."""
    checked: Counter[bool | None] = Counter()
    for schema, answer in asked:
        if schema is None or judge(answer) != "served":
            continue
        text = answer.body["choices"][0]["text"]
        fits = satisfies(text, schema)
        checked[fits] += 1
        if fits is False:
            print(json.dumps({"schema": schema, "does not allow": text}), flush=True)
    return checked


def judge(answer: Answer) -> str:
    """What became of a request: "served", "cut_short" at its last token or mask, "refused", "failed" otherwise."""
    if answer.status == 400:
        return "refused"
    if not answer.is_served:
        return "failed"
    return "served" if answer.body["choices"][0]["finish_reason"] == "stop" else "cut_short"


def _as_enforced(schema: Any) -> Any:
    """``schema`` as the server enforces it (docs/operations.md): ``oneOf`` is ``anyOf``, patterns are ECMA's.

    To ECMA a byte order mark is white space, to Python it is not.
    """
    if isinstance(schema, dict):
        return {"anyOf" if key == "oneOf" else key: _as_enforced(value) for key, value in schema.items()}
    if isinstance(schema, str):
        return schema.replace(r"\s", r"[\s\ufeff]")
    return [_as_enforced(item) for item in schema] if isinstance(schema, list) else schema


def satisfies(text: str, schema: dict[str, Any]) -> bool | None:
    """Whether ``text`` is JSON as ``schema`` wants it; None where the reference implementation cannot tell.

    Python backtracks where patterns repeat repetitions, so each check has a second. Only for the main thread.
    """
    try:
        instance = json.loads(text)
    except ValueError:
        return False
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, _CHECK_SECONDS)
    try:
        return bool(jsonschema.Draft202012Validator(_as_enforced(schema)).is_valid(instance))
    except Exception:  # patterns that Python has no words for, references in circles, time
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _give_up(*_: object) -> None:
    raise TimeoutError


def _long_steps(server: Server) -> float:
    """Steps whose choice of tokens, or whose work beside the model and the draft, took over 100 ms."""
    total = 0.0
    for part in ("sample", "overhead"):
        count = server.metric("evospec:engine_step_seconds_count", part=part)
        total += count - server.metric("evospec:engine_step_seconds_bucket", part=part, le=_LONG_STEP)
    return total
