"""What a tenant's draft lengths depend on: costs, the step's sequences, and how its own drafts have fared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.speculation.length import acceptance
from evospec.engine.speculation.length.acceptance import Tenants
from evospec.engine.speculation.length.costs import Curve, StepCosts
from evospec.engine.step import Proposal
from evospec.kernels.native_chain import CONFIDENCE_LEVELS
from tests.named_policy import TOKEN, NamedPolicy

COSTS = StepCosts(verify=Curve([(1, 10.0), (64, 16.3)]), first_draft=Curve([(1, 1.0)]), next_draft=Curve([(1, 1.0)]))
LIMIT = 6


@dataclass(frozen=True)
class Traffic:
    """Steps of one sequence."""

    steps: int
    num_right: int
    """Drafts of each chain that are right; the next one is wrong."""
    level: int
    """How sure the draft is of each token, and the level of what repeats."""
    greedy: bool
    repeats: bool


TRAFFIC = st.lists(
    st.builds(
        Traffic,
        steps=st.sampled_from([1, 7, 40, 280]),
        num_right=st.integers(0, LIMIT),
        level=st.integers(0, CONFIDENCE_LEVELS - 1),
        greedy=st.booleans(),
        repeats=st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


class Served:
    """A policy, and requests served one after the other."""

    def __init__(self) -> None:
        self._policy = NamedPolicy(COSTS, stops_early=True)
        self._num_requests = 0

    def serve(self, tenant: str, traffic: Sequence[Traffic]) -> list[object]:
        """Everything that the policy decides, step by step."""
        return [decision for one in traffic for decision in self._serve(tenant, one)]

    def _serve(self, tenant: str, traffic: Traffic) -> list[object]:
        self._num_requests += 1
        name, policy, decisions = str(self._num_requests), self._policy, list[object]()
        levels = [traffic.level] * LIMIT
        repeat = levels if traffic.repeats else []
        request = policy.request(name, tenant, temperature=0.0 if traffic.greedy else 1.0)
        outcomes = [place < traffic.num_right for place in range(min(traffic.num_right + 1, LIMIT))]
        decisions.append(policy.policy.drafts_for_most(tenant))
        for _ in range(traffic.steps):
            (most,) = policy.lengths({name: LIMIT}, repeats={name: repeat})
            is_copied = name in policy.copied
            decisions.append((most, is_copied))
            if most and not is_copied and (stop := policy.stop_rule({name: most})) is not None:
                chances = stop.rule.chances[stop.tenants[request]].tolist()
                decisions += [chances, stop.acceptance[request], stop.rule.verify_costs]
            if most:
                proposal = Proposal([TOKEN] * most, confidence=levels[:most])
                decisions.append(policy.worth_verifying({name: proposal})[name])
            if most and not is_copied:
                policy.record_drafts(name, levels[:most], outcomes[:most], repeat)
            if repeat:
                policy.record_copy(name, repeat, outcomes)
        return decisions


@settings(max_examples=30, deadline=None)
@given(first=TRAFFIC, others=TRAFFIC, then=TRAFFIC)
def test_what_others_were_served_changes_no_decision(
    first: list[Traffic], others: list[Traffic], then: list[Traffic]
) -> None:
    alone, among_others = Served(), Served()
    assert alone.serve("a", first) == among_others.serve("a", first)
    among_others.serve("b", others)
    assert alone.serve("a", then) == among_others.serve("a", then)


WRONG = Traffic(steps=400, num_right=0, level=8, greedy=True, repeats=False)


def test_what_a_tenant_was_served_itself_does() -> None:
    served = Served()
    before = served.serve("a", [WRONG])
    assert served.serve("a", [WRONG]) != before


def test_each_chain_of_a_step_ends_by_the_chances_of_its_tenant() -> None:
    policy = NamedPolicy(COSTS, stops_early=True)
    requests = [policy.request(name, tenant) for name, tenant in zip("012", "aba", strict=True)]
    policy.lengths(dict.fromkeys("012", LIMIT))
    for name, right in (("0", True), ("1", False)):
        for _ in range(300):
            policy.record_drafts(name, [8], [right])
    stop = policy.stop_rule(dict.fromkeys("012", LIMIT))
    assert stop is not None
    chances = [stop.rule.chances[stop.tenants[request], 0, 8] for request in requests]
    assert chances[0] == chances[2] > 0.9
    assert chances[1] < 0.3


def test_a_tenant_whose_drafts_fail_beside_one_whose_drafts_are_right_is_tried_again() -> None:
    """Its own steps without drafts count, not those of the engine."""
    policy = NamedPolicy(COSTS)
    policy.request("0", "good"), policy.request("1", "bad")
    history = []
    for _ in range(1200):
        most = policy.lengths(dict.fromkeys("01", LIMIT))
        for name, length, right in zip("01", most, (True, False), strict=True):
            if length:
                policy.record_drafts(name, [], [right] * (length if right else 1))
        history.append(most)
    assert all(good for good, _ in history)
    assert 0 < sum(bad > 0 for _, bad in history[600:]) < 60


def test_the_tenant_that_was_not_used_for_longest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "MAX_TENANTS", 2)
    tenants = Tenants()
    a, b = tenants.of("a"), tenants.of("b")
    assert tenants.of("a") is a
    tenants.of("c")
    assert tenants.of("a") is a
    assert tenants.of("b") is not b
