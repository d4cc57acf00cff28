"""Whether the number of tokens drafted for a tenant's fixed prompt tells what other tenants are doing."""

from __future__ import annotations

import random
import statistics
import threading
import time
from pathlib import Path

from benchmarks.attack.bars import Bar
from benchmarks.attack.clients import ask
from benchmarks.attack.server import ATTACKER, MODEL, VICTIM, Server, serving

_REPEATS = 8
_TRAFFIC_SECONDS = 25.0
_CLIENTS = 2
_FIXED = {"model": MODEL, "prompt": "Write the numbers from one to twenty:", "max_tokens": 64, "temperature": 0}
BARS = {"drafted_after_over_before": Bar(0.9, 1.1)}


def run(source: Path) -> dict[str, float]:
    """Draft tokens of one greedy answer: before, and after 25 seconds of another tenant's hot and random requests."""
    with serving(source, "acceptance") as server:
        _drafted(server)
        before = _drafted(server)
        _unlike_traffic(server)
        after = _drafted(server)
    return {
        "drafted_before": statistics.median(before),
        "drafted_after": statistics.median(after),
        "drafted_after_over_before": statistics.median(after) / statistics.median(before),
        "spread_alone": max(before) - min(before),
    }


def _drafted(server: Server) -> list[int]:
    counts = []
    for _ in range(_REPEATS):
        answer = ask(server, VICTIM, _FIXED)
        counts.append(int(answer.body["metrics"]["speculative_decoding"]["num_draft_tokens"]))
    return counts


def _unlike_traffic(server: Server) -> None:
    """One request at a time from each client, of tokens drawn at random, so that drafts are seldom right."""
    end = time.monotonic() + _TRAFFIC_SECONDS

    def send(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            prompt = [chance.randrange(1000, 40_000) for _ in range(40)]
            ask(server, ATTACKER, {"model": MODEL, "prompt": prompt, "max_tokens": 64, "temperature": 2})

    clients = [threading.Thread(target=send, args=(seed,)) for seed in range(_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
