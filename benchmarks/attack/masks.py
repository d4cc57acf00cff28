"""Schemas whose token masks cost much, asked for by one tenant with many sequences, while another asks for 4 tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import FOUR_TOKENS, ask, victim, victim_figures, with_schema
from benchmarks.attack.server import ATTACKER, MODEL, serving


def _pattern(expression: str) -> dict[str, Any]:
    return {"type": "string", "pattern": expression}


_ARRAY = {"type": "array", "items": {"type": "string"}}
SCHEMAS: dict[str, list[dict[str, Any]]] = {
    "optional": [_pattern(f"^(.?){{{count}}}$") for count in (500, 250, 120, 60, 30, 15)],
    "nested": [
        _pattern(r"^((((([^a])+)*){1,}|😀[^a](?:\.)\s)|\d)$"),
        _pattern("^(([^a]+)*)*$"),
        _pattern("^((a|b|.)*(c|.)*)*$"),
        _pattern("^(.*a.*)*$"),
    ],
    "wide": [{"anyOf": [_ARRAY] * count} for count in (1100, 500, 200, 80, 30)],
}
"""Each family from the costliest on: what is refused by its cost is followed by what may be let in."""
BODY = {"model": MODEL, "prompt": ["zq"] * 10, "n": 16, "max_tokens": 40, "temperature": 2}
LIMIT_SECONDS = 120.0
_CALM_SECONDS = 2.0
BARS = {
    f"{name}_{figure}": bar
    for name in SCHEMAS
    for figure, bar in (("victim_longest_seconds", at_most(1)), ("victim_unserved", exactly(0)))
}


def run(source: Path) -> dict[str, float]:
    """Each family against a server of its own; the longest that the victim waits for an answer."""
    figures: dict[str, float] = {}
    for name, schemas in SCHEMAS.items():
        with serving(source, f"masks-{name}") as server:
            ask(server, ATTACKER, FOUR_TOKENS)
            until = time.monotonic() + LIMIT_SECONDS
            statuses = []
            with victim(server, until) as answers:
                time.sleep(_CALM_SECONDS)
                for schema in schemas:
                    left = max(1.0, until - time.monotonic())
                    statuses.append(ask(server, ATTACKER, with_schema(BODY, schema), timeout=left).status)
                time.sleep(_CALM_SECONDS)
        seen = victim_figures(answers) | {
            "attacker_served": statuses.count(200),
            "attacker_refused": statuses.count(400),
        }
        figures |= {f"{name}_{figure}": value for figure, value in seen.items()}
    return figures
