"""The buckets of a process: against a plain model, and what they let through in any stretch of time."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.server.rate_limit import TokenBuckets
from evospec.server.tenants import Tenant

# Sixty times a whole number a minute, and quarters of seconds: no sum is rounded, so the model must agree exactly.
CAPACITIES = st.none() | st.integers(1, 5).map(lambda number: 60 * number)
STEPS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 1), st.integers(-400, 400)), max_size=40)
"""Quarters of a second that pass, requests and tokens that are taken then."""


class Model:
    """One bucket as a list of what was ever taken, from which its level is found each time anew."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.taken: list[tuple[int, int]] = []

    def level(self, now: int) -> Fraction:
        assert self.capacity is not None
        level, then = Fraction(self.capacity), 0
        for time, cost in [*self.taken, (now, 0)]:
            level = min(Fraction(self.capacity), level + Fraction(self.capacity * (time - then), 4 * 60))
            level, then = min(Fraction(self.capacity), level - cost), time
        return level

    def missing(self, now: int, cost: int) -> Fraction:
        """Seconds until ``cost`` can be taken."""
        if self.capacity is None or cost <= 0:
            return Fraction(0)
        return max(Fraction(0), (cost - self.level(now)) * 60 / self.capacity)


@given(CAPACITIES, CAPACITIES, STEPS)
def test_buckets_are_those_of_the_model(
    requests: int | None, tokens: int | None, steps: list[tuple[int, int, int]]
) -> None:
    now = 0
    buckets = TokenBuckets(lambda: now / 4)
    tenant = Tenant(name="acme", requests_per_minute=requests, tokens_per_minute=tokens)
    models = Model(requests), Model(tokens)
    for quarters, *costs in steps:
        now += quarters
        lacking, wait = buckets.take(tenant, *costs)
        waits = [model.missing(now, cost) for model, cost in zip(models, costs, strict=True)]
        assert (lacking is not None) == any(waits)
        assert wait == pytest.approx(float(max(waits)), abs=0.0011)
        if lacking is None:
            for model, cost in zip(models, costs, strict=True):
                model.taken.append((now, cost))
        else:
            assert waits[["requests", "tokens"].index(lacking)] == max(waits)


@given(st.integers(1, 100), st.lists(st.tuples(st.floats(0, 90), st.integers(1, 100)), max_size=30))
def test_no_stretch_of_time_lets_more_through_than_a_full_bucket_and_its_refill(
    capacity: int, steps: list[tuple[float, int]]
) -> None:
    now = 0.0
    buckets = TokenBuckets(lambda: now)
    tenant = Tenant(name="acme", requests_per_minute=None, tokens_per_minute=capacity)
    admitted = []
    for seconds, cost in steps:
        now += seconds
        if buckets.take(tenant, 1, cost)[0] is None:
            admitted.append((now, cost))
    for first, last in combinations(range(len(admitted)), 2):
        total = sum(cost for _, cost in admitted[first : last + 1])
        assert total <= capacity * (1 + (admitted[last][0] - admitted[first][0]) / 60) + 1e-6


def test_tenants_do_not_share_buckets() -> None:
    buckets = TokenBuckets(lambda: 0.0)
    for name in ("acme", "bravo"):
        tenant = Tenant(name=name, requests_per_minute=1, tokens_per_minute=None)
        assert [buckets.take(tenant, 1, 0)[0] for _ in range(2)] == [None, "requests"]
