"""What has a budget of time takes its share over a while, and what it saved at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.online.verify_log import TimeBudget

SHARE, MOST = 0.01, 2.0


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 3))))
def test_it_is_kept_over_any_time(events: list[tuple[float, float]]) -> None:
    """Each event: seconds that are worked, and what somebody spends then if anything is left."""
    worked, spent, longest = 0.0, 0.0, 0.0
    budget = TimeBudget(SHARE, MOST)
    for passed, seconds in events:
        worked += passed
        budget.earn(passed)
        if budget.is_left():
            budget.spend(seconds)
            spent, longest = spent + seconds, max(longest, seconds)
        assert spent <= MOST + SHARE * worked + longest + 1e-6


def test_debt_is_paid_by_work() -> None:
    budget = TimeBudget(SHARE, MOST)
    budget.spend(3.0)
    budget.earn(99.0)
    assert not budget.is_left()
    budget.earn(2.0)
    assert budget.is_left()
