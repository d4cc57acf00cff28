"""Token buckets of tenants in this process, with the arithmetic of the ones in Redis."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal

from server.tenants import Tenant

Limit = Literal["requests", "tokens"]
_MINUTE = 60.0


class TokenBuckets:
    """A bucket for requests and one for tokens of each tenant that has such limits.

    A bucket holds a minute's worth, is full at first and refills steadily.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, Limit], tuple[float, float]] = {}
        """Level of each bucket, and when it had it; as many as there are tenants in the keys file, twice."""

    def take(self, tenant: Tenant, requests: int, tokens: int) -> tuple[Limit | None, float]:
        """Take from both buckets, or from neither; a negative number gives back, and never more than fits.

        Returns the limit for which there is too little (None: all was taken), and the seconds until there is enough.
        """
        now = self._clock()
        levels: dict[tuple[str, Limit], tuple[float, float]] = {}
        lacking: Limit | None = None
        wait = 0.0
        for limit, capacity, cost in _wanted(tenant, requests, tokens):
            bucket = (tenant.name, limit)
            level, since = self._levels.get(bucket, (capacity, now))
            level = min(capacity, level + (now - since) * capacity / _MINUTE)
            level = min(capacity, level - cost)
            if cost > 0 and level < 0 and -level * _MINUTE / capacity > wait:
                lacking, wait = limit, -level * _MINUTE / capacity
            levels[bucket] = (level, now)
        if lacking is None:
            self._levels |= levels
        return lacking, math.ceil(wait * 1000) / 1000


def _wanted(tenant: Tenant, requests: int, tokens: int) -> list[tuple[Limit, int, int]]:
    """Name, capacity and cost for each limit that ``tenant`` has."""
    wanted: list[tuple[Limit, int | None, int]] = [
        ("requests", tenant.requests_per_minute, requests),
        ("tokens", tenant.tokens_per_minute, tokens),
    ]
    return [(limit, capacity, cost) for limit, capacity, cost in wanted if capacity is not None]
