"""Schemas whose token masks cost much, asked for by one tenant with many sequences, while another asks for 4 tokens."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import FOUR_TOKENS, Victim, ask, with_schema
from benchmarks.attack.server import ATTACKER, MODEL, serving

SCHEMAS = {
    "optional": {"type": "string", "pattern": "^(.?){500}$"},
    "nested": {"type": "string", "pattern": r"^((((([^a])+)*){1,}|😀[^a](?:\.)\s)|\d)$"},
    "wide": {"anyOf": [{"type": "array", "items": {"type": "string"}}] * 1100},
}
LIMIT_SECONDS = 120.0
BODY = {"model": MODEL, "prompt": ["zq"] * 10, "n": 16, "max_tokens": 40, "temperature": 2}
_CALM_SECONDS = 2.0
BARS = {
    f"{name}_{figure}": bar
    for name in SCHEMAS
    for figure, bar in (("victim_longest_seconds", at_most(1)), ("victim_unserved", exactly(0)))
}


def run(source: Path) -> dict[str, float]:
    """Each schema against a server of its own; the longest that the victim waits for an answer."""
    figures: dict[str, float] = {}
    for name, schema in SCHEMAS.items():
        with serving(source, f"masks-{name}") as server:
            ask(server, ATTACKER, FOUR_TOKENS)
            until = time.monotonic() + LIMIT_SECONDS
            with Victim(server, until) as victim:
                time.sleep(_CALM_SECONDS)
                answer = ask(server, ATTACKER, with_schema(BODY, schema), timeout=LIMIT_SECONDS - _CALM_SECONDS)
                time.sleep(_CALM_SECONDS)
            seen = victim.figures() | {"attacker_status": answer.status, "attacker_seconds": answer.seconds}
        figures |= {f"{name}_{figure}": value for figure, value in seen.items()}
    return figures
