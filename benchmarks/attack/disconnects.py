"""Two hundred streams of one tenant at once, beside five hundred of another whose clients go away at random."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from benchmarks.attack.bars import Bar, exactly
from benchmarks.attack.clients import COMPLETIONS
from benchmarks.attack.server import ATTACKER, MODEL, VICTIM, Server, serving
from evospec.server.bench.stream import StreamResult, stream

_STREAMS, _LEAVERS, _LEAVERS_AT_ONCE = 200, 500, 50
_PATIENCE = 10.0
_SETTLE_SECONDS = 20.0
_SHARED = "Once upon a time " * 16
BARS = {
    "streams_at_once": exactly(_STREAMS),
    "gone": Bar(least=_LEAVERS / 2),
    "failed": exactly(0),
    "blocks_left": exactly(0),
    "sequences_left": exactly(0),
}


def run(source: Path) -> dict[str, float]:
    with serving(source, "disconnects") as server:
        return measure(server, _STREAMS, _LEAVERS, _PATIENCE)


def measure(server: Server, num_streams: int, num_leavers: int, patience: float) -> dict[str, float]:
    """Clients of the attacker leave after up to ``patience`` seconds; what is left in the engine is waited for."""
    results = asyncio.run(_traffic(server, num_streams, num_leavers, patience))
    deadline = time.monotonic() + _SETTLE_SECONDS
    while any((left := _left(server)).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    staying = results[:num_streams]
    first_end = min(result.end for result in staying)
    errors = [result.error for result in results if result.error is not None]
    gone = errors.count("dropped by the client")
    return {
        "streams_at_once": sum(bool(one.token_times) and one.token_times[0] < first_end for one in staying),
        "gone": gone,
        "gone_before_a_token": sum(not result.token_times for result in results[num_streams:]),
        "failed": len(errors) - gone,
        **left,
    }


async def _traffic(server: Server, num_streams: int, num_leavers: int, patience: float) -> list[StreamResult]:
    """The streams' results, then the leavers'. All texts begin alike, so that they share blocks."""
    chance, room = random.Random(7), asyncio.Semaphore(_LEAVERS_AT_ONCE)

    async def ask(tenant: str, number: int, max_tokens: int, drop_after: float | None = None) -> StreamResult:
        body = {"model": MODEL, "prompt": f"{_SHARED}{number}", "max_tokens": max_tokens, "ignore_eos": True}
        url = server.url + COMPLETIONS
        return await stream(url, {**body, "stream": True}, api_key=server.keys[tenant], drop_after=drop_after)

    async def leave(number: int) -> StreamResult:
        async with room:
            return await ask(ATTACKER, number, 512, chance.uniform(0.02, patience))

    staying = [ask(VICTIM, number, 128) for number in range(num_streams)]
    return await asyncio.gather(*staying, *map(leave, range(num_leavers)))


def _left(server: Server) -> dict[str, float]:
    states = ("running", "waiting")
    return {
        "blocks_left": server.metric("evospec:kv_blocks_used"),
        "sequences_left": sum(server.metric(f"evospec:num_requests_{state}") for state in states),
    }
