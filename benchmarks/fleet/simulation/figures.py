"""The figures of a run, measured or simulated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from benchmarks.common.bootstrap import interval
from benchmarks.fleet.simulation.fleet import Served
from benchmarks.fleet.simulation.replica import Costs

_CALLS_OPEN, _CALLS_CREATE, _CALLS_SAVE = 10, 12, 4
"""Commands of the scripts of ``server.session_hashes``, each script's own call included."""


def figures(served: Sequence[Served]) -> dict[str, float]:
    """What clients and logs say of a run."""
    seconds = max(one.end for one in served)
    later = [one for one in served if one.turn]
    first = [one.first_token - one.start for one in served]
    whole = [one.end - one.start for one in served]
    return {
        "requests": len(served),
        "seconds": seconds,
        "tokens_per_second": sum(one.output_tokens for one in served) / seconds,
        **{f"first_token_p{p}": float(np.percentile(first, p)) for p in (50, 90, 99)},
        **{f"answer_p{p}": float(np.percentile(whole, p)) for p in (50, 90, 99)},
        "prefix_hits": sum(one.cached_tokens for one in served) / sum(one.prompt_tokens for one in served),
        "stayed": sum(one.stayed for one in later) / max(len(later), 1),
        "tokens_per_event": sum(one.output_tokens for one in served) / sum(one.events for one in served),
    }


def interval_of(served: Sequence[Served], name: str) -> tuple[float, float]:
    """Between what a figure would be in 95 of 100 runs, if other conversations like these were told."""
    of_session = defaultdict[str, list[Served]](list)
    for one in served:
        of_session[one.session].append(one)
    told = list(of_session.values())
    _, low, high = interval(told, lambda drawn: figures(list(chain.from_iterable(drawn)))[name])
    return low, high


def texts(served: Sequence[Served]) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Of each turn, in the order in which they began: its session, and what the size of its snapshot goes by.

    That is 1, the tokens that the session was asked so far, and those that it answered.
    """
    answered = Counter[str]()
    for one in sorted(served, key=lambda one: one.start):
        answered[one.session] += one.output_tokens
        said = answered[one.session]
        yield one.session, (1, one.prompt_tokens + one.output_tokens - said, said)


def redis_figures(served: Sequence[Served], costs: Costs) -> dict[str, float]:
    """What the model says of Redis, a request."""
    size = defaultdict[str, float](float)
    saved = loaded = 0.0
    for session, text in texts(served):
        loaded += size[session]
        size[session] = float(np.dot(costs.snapshot, text))
        saved += size[session]
    created, count = len(size), len(served)
    to_redis, from_redis = costs.redis
    return {
        "redis_calls": _CALLS_SAVE + _CALLS_OPEN + (_CALLS_CREATE - _CALLS_OPEN) * created / count,
        "redis_in": to_redis + saved / count,
        "redis_out": from_redis + loaded / count,
    }
