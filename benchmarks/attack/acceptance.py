"""Whether the number of tokens drafted for a tenant's fixed prompt tells what other tenants are doing."""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median

from benchmarks.attack.bars import Bar
from benchmarks.attack.clients import ask
from benchmarks.attack.server import ATTACKER, MODEL, VICTIM, Server, serving

_REPEATS = 8
_TRAFFIC_SECONDS = 4.0
_FIXED = {"model": MODEL, "prompt": "Write the numbers from one to twenty:", "max_tokens": 64, "temperature": 0}
_RANDOM = {"model": MODEL, "max_tokens": 64, "temperature": 2, "ignore_eos": True}
BARS = {"drafted_after_over_before": Bar(0.9, 1.1)}


def run(source: Path) -> dict[str, float]:
    """Draft tokens of one greedy answer: alone, and each time after four seconds of another tenant's random traffic."""
    chance = random.Random(0)
    with serving(source, "acceptance") as server:
        for _ in range(_REPEATS):
            _drafted(server)
        before = [_drafted(server) for _ in range(_REPEATS)]
        after = []
        for _ in range(_REPEATS):
            _unlike_traffic(server, chance)
            after.append(_drafted(server))
    return {
        "drafted_before": median(before),
        "drafted_after": median(after),
        "drafted_after_over_before": median(after) / median(before),
        "spread_alone": max(before) - min(before),
    }


def _drafted(server: Server) -> int:
    metrics = ask(server, VICTIM, _FIXED).body["metrics"]
    return int(metrics["speculative_decoding"]["num_draft_tokens"])


def _unlike_traffic(server: Server, chance: random.Random) -> None:
    """One request after the other, of tokens drawn at random, so that drafts are seldom right."""
    end = time.monotonic() + _TRAFFIC_SECONDS
    while time.monotonic() < end:
        ask(server, ATTACKER, {**_RANDOM, "prompt": [chance.randrange(1000, 40_000) for _ in range(40)]})
