"""Schemas that take long to compile, and whether a schema's time tells what another tenant has asked for."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.attack.bars import Bar, at_most, exactly
from benchmarks.attack.clients import CHAT, Answer, ask, with_schema
from benchmarks.attack.server import ATTACKER, MODEL, VICTIM, Server, serving

LIMIT_SECONDS = 60.0
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
SLOW = (
    {"type": "string", "pattern": "^" + ".?" * 200 + "$"},
    {"type": "string", "pattern": "^" + "(a|b|[^c])?" * 80 + "$"},
    {"type": "object", "properties": {f"field{index}": {"type": "string", "pattern": ".?" * 40} for index in range(8)}},
)
_ORACLE_SCHEMAS = 3
BARS = {
    "tiny_schema_seconds": at_most(2),
    "tiny_schema_status": exactly(200),
    "no_schema_seconds": at_most(1),
    "no_schema_status": exactly(200),
    "attacker_longest_seconds": at_most(10 * len(SLOW) + 5),
    "known_to_another_over_unknown": Bar(least=0.5),
}


def run(source: Path) -> dict[str, float]:
    """Slow schemas of the attacker's on one server, the oracle on another."""
    with serving(source, "compiling") as server:
        figures = _slow_schemas(server)
    with serving(source, "oracle") as server:
        return figures | _oracle(server)


def _slow_schemas(server: Server) -> dict[str, float]:
    def attack(schema: object) -> Answer:
        return ask(server, ATTACKER, with_schema(BODY, schema), CHAT, LIMIT_SECONDS)

    with ThreadPoolExecutor(len(SLOW)) as pool:
        attacks = pool.map(attack, SLOW)
        time.sleep(1)
        tiny = with_schema(BODY, {"type": "object", "properties": {"x": {"type": "integer"}}})
        with_tiny = ask(server, VICTIM, tiny, CHAT, LIMIT_SECONDS)
        without = ask(server, VICTIM, BODY, CHAT, LIMIT_SECONDS)
        answers = list(attacks)
    return {
        "tiny_schema_seconds": with_tiny.seconds,
        "tiny_schema_status": with_tiny.status,
        "no_schema_seconds": without.seconds,
        "no_schema_status": without.status,
        "attacker_longest_seconds": max(answer.seconds for answer in answers),
        "attacker_served": sum(answer.is_served for answer in answers),
    }


def _oracle(server: Server) -> dict[str, float]:
    """Seconds of schemas that nobody, another tenant and the tenant itself had compiled; medians."""
    ask(server, VICTIM, with_schema(BODY, _wide_schema("first")), CHAT)
    seconds: dict[str, list[float]] = {"attacker": [], "another": [], "own": [], "unknown": []}
    for index in range(_ORACLE_SCHEMAS):
        shared, alone = _wide_schema(f"shared{index}_"), _wide_schema(f"single{index}_")
        asked = (("attacker", ATTACKER, shared), ("another", VICTIM, shared), ("own", VICTIM, shared))
        for name, tenant, schema in (*asked, ("unknown", VICTIM, alone)):
            seconds[name].append(ask(server, tenant, with_schema(BODY, schema), CHAT).seconds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "known_to_another_over_unknown": medians["another"] / medians["unknown"],
        **{f"schema_seconds_{name}": value for name, value in medians.items()},
    }


def _wide_schema(prefix: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": True, "properties": {f"{prefix}{i}": {} for i in range(120)}}
