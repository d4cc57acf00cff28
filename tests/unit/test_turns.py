"""Turns of tenants: at most one job each, by bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from evospec.server.work_shares import Turns

TENANTS = st.sampled_from("abc")
SIZES = st.integers(1, 9)


class TurnsMachine(RuleBasedStateMachine):
    """Against a plain model: lists of what waits, what runs, and what each tenant was given."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: Turns[int] = Turns()
        self.waiting: dict[str, list[tuple[int, int]]] = {tenant: [] for tenant in "abc"}
        self.running: dict[str, int] = {}
        self.service = dict.fromkeys("abc", 0)
        self.count = 0

    def active(self) -> list[str]:
        return [tenant for tenant in "abc" if self.waiting[tenant] or tenant in self.running]

    @rule(tenant=TENANTS, size=SIZES)
    def add(self, tenant: str, size: int) -> None:
        if tenant not in self.active():
            floor = min((self.service[other] for other in self.active()), default=0)
            self.service[tenant] = max(self.service[tenant], floor)
        self.count += 1
        self.turns.add(tenant, size, self.count)
        self.waiting[tenant].append((size, self.count))

    @rule()
    def take(self) -> None:
        taken = self.turns.take()
        ready = [tenant for tenant in "abc" if self.waiting[tenant] and tenant not in self.running]
        if not ready:
            assert taken is None
            return
        assert taken is not None
        tenant, job = taken
        assert self.service[tenant] == min(self.service[one] for one in ready)
        size, expected = self.waiting[tenant].pop(0)
        assert job == expected
        self.service[tenant] += size
        self.running[tenant] = job

    @rule(tenant=TENANTS)
    def done(self, tenant: str) -> None:
        if self.running.pop(tenant, None) is not None:
            self.turns.done(tenant)

    @rule(tenant=TENANTS, data=st.data())
    def leave(self, tenant: str, data: st.DataObject) -> None:
        if self.waiting[tenant]:
            chosen = data.draw(st.sampled_from(self.waiting[tenant]))
            self.waiting[tenant].remove(chosen)
            self.turns.remove(tenant, chosen[1])
        elif tenant in self.running:
            self.turns.remove(tenant, self.running[tenant])  # a job that runs stays

    @invariant()
    def an_idle_system_forgets(self) -> None:
        if not self.active():
            self.service = dict.fromkeys("abc", 0)


TestTurns = TurnsMachine.TestCase
TestTurns.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(st.lists(st.tuples(TENANTS, SIZES), min_size=1, max_size=60))
def test_no_tenant_that_waits_falls_behind_by_more_than_a_job(jobs: list[tuple[str, int]]) -> None:
    turns: Turns[tuple[str, int]] = Turns()
    for tenant, size in jobs:
        turns.add(tenant, size, (tenant, size))
    left, given_bytes = list(jobs), dict.fromkeys("abc", 0)
    while (taken := turns.take()) is not None:
        tenant, job = taken
        left.remove(job)
        given_bytes[tenant] += job[1]
        turns.done(tenant)
        waiting = {name for name, _ in left}
        assert all(given_bytes[tenant] - given_bytes[other] <= 9 for other in waiting)
    assert not left
