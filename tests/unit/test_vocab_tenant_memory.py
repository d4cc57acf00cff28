"""What a tenant's sessions leave behind: for that tenant only, bounded, the recent before the old."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.draft_vocab.past import DecayedCounts, TenantMemory


def test_recent_tokens_outweigh_old_ones() -> None:
    counts = DecayedCounts(half_life=10.0)
    counts.add([1] * 6)
    counts.add([2] * 2)
    assert counts.top(5) == [1, 2]
    counts.add([3] * 40)
    counts.add([2])
    assert counts.top(2) == [3, 2]


@given(tokens=st.lists(st.integers(0, 200), max_size=400))
def test_entries_are_bounded(tokens: list[int]) -> None:
    counts = DecayedCounts(max_tokens=10)
    for token_id in tokens:
        counts.add([token_id])
        assert len(counts) <= 20
    assert len(counts.top(1000)) <= 10


def test_frequent_tokens_survive_pruning() -> None:
    counts = DecayedCounts(max_tokens=10, half_life=1000.0)
    for token_id in range(100, 300):
        counts.add([token_id, 7])
    assert counts.top(1) == [7]


@given(runs=st.lists(st.lists(st.integers(0, 20), max_size=12), max_size=5), limits=st.lists(st.integers(0, 30)))
def test_the_largest_counts_come_first_and_of_equals_the_least_token(runs: list[list[int]], limits: list[int]) -> None:
    """Whatever was asked for before, and however often."""
    counts, expected = DecayedCounts(max_tokens=15, half_life=1e300), dict[int, int]()  # so that many are equal
    for tokens in runs:
        counts.add(tokens)
        expected |= {token_id: expected.get(token_id, 0) + tokens.count(token_id) for token_id in tokens}
        ranked = sorted(expected, key=lambda token_id: (-expected[token_id], token_id))
        assert [counts.top(limit) for limit in limits] == [ranked[: min(limit, 15)] for limit in limits]


def test_no_code_runs_for_each_token_that_is_ranked() -> None:
    counts, calls = DecayedCounts(), list[str]()
    counts.add(range(2 * 4096))
    sys.setprofile(lambda _, event, __: calls.append(event))
    try:
        counts.top(1024)
    finally:
        sys.setprofile(None)
    assert len(calls) < 100


def test_long_use_keeps_counts_finite() -> None:
    counts = DecayedCounts(half_life=0.1)
    for _ in range(100):
        counts.add([1, 2])
    assert counts.top(2) == [2, 1]


def test_a_domain_comes_before_the_rest_of_its_tenant() -> None:
    memory = TenantMemory()
    memory.add("clinic", "oncology", [1, 1, 2])
    memory.add("clinic", "billing", [3] * 5)
    memory.add("firm", "oncology", [9] * 9)
    assert memory.top("clinic", "oncology", 10) == [1, 2, 3]
    assert memory.top("clinic", "oncology", 2) == [1, 2]
    assert memory.top("clinic", "surgery", 1) == [3]
    assert memory.top("clinic", None, 10) == [3, 1, 2]
    assert memory.top("stranger", "oncology", 10) == []


def test_weights_average_over_sessions() -> None:
    memory = TenantMemory()
    assert memory.weights("clinic", "oncology") is None
    memory.end_session("clinic", "oncology", [1.0, 2.0, 0.0, 0.0, 0.0])
    assert memory.weights("clinic", "oncology") == pytest.approx([1.0, 2.0, 0.0, 0.0, 0.0])
    for _ in range(30):
        memory.end_session("clinic", "oncology", [0.0, 3.0, 99.0, 0.0, 0.0])
    assert memory.weights("clinic", "oncology") == pytest.approx([0.0, 3.0, 10.0, 0.0, 0.0], abs=0.02)
    assert memory.weights("clinic", "surgery") == memory.weights("clinic", None) is not None
    assert memory.weights("firm", "oncology") is None


def test_the_least_recent_tenants_and_domains_are_forgotten() -> None:
    memory = TenantMemory(max_tenants=2, max_domains=2)
    memory.add("a", None, [1])
    memory.add("b", None, [2])
    memory.add("a", None, [1])
    memory.add("c", None, [3])
    assert [memory.top(tenant, None, 1) for tenant in "abc"] == [[1], [], [3]]
    for domain in ("x", "y", "z"):
        memory.add("a", domain, [5])
        memory.end_session("a", domain, [1.0, 0.0, 0.0, 0.0, 0.0])
    memory.end_session("a", None, [5.0, 0.0, 0.0, 0.0, 0.0])
    whole = memory.weights("a", None)
    assert [memory.weights("a", domain) == whole for domain in ("x", "y", "z")] == [True, False, False]


def test_a_tenant_with_many_domains_costs_no_other_its_memory() -> None:
    memory = TenantMemory(max_tenants=2, max_domains=3)
    memory.add("quiet", "law", [1])
    for domain in range(100):
        memory.add("loud", str(domain), [2])
    assert memory.top("quiet", "law", 5) == [1]


def test_what_all_tenants_have_together_is_bounded() -> None:
    """The least recently used tenant is forgotten; what is counted again, or was forgotten, takes no room."""
    memory = TenantMemory(max_tenants=3, max_domains=2, max_remembered=40)
    for _ in range(50):
        memory.add("old", "law", range(10))
    for domain in range(50):
        memory.add("many", str(domain), [1, 2])
        memory.add("old", "law", [1])
    assert len(memory.top("old", "law", 99)) == 10
    for tenant in range(50):
        memory.add("old", "law", [1])
        memory.add(str(tenant), None, range(10))
    assert [len(memory.top(tenant, None, 99)) for tenant in ("old", "48", "49")] == [10, 10, 10]
    memory.add("new", None, range(20))
    assert [len(memory.top(tenant, None, 99)) for tenant in ("old", "48", "49", "new")] == [0, 0, 10, 20]
