"""Draft lengths from a scripted cost table: no clock, so every run decides the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise, product
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.speculation.length import cost_meter
from evospec.engine.speculation.length.costs import Curve, ServedCosts, StepCosts, without_spikes
from evospec.engine.speculation.length.plan import best_plan, best_verified
from evospec.engine.speculation.length.policy import Candidate
from evospec.engine.step import Proposal
from evospec.kernels.native_chain import CONFIDENCE_LEVELS
from tests.named_policy import TOKEN, NamedPolicy

ONE_EACH = Curve([(1, 1.0), (2, 2.0)])
CHEAP = StepCosts(verify=Curve([(1, 10.0), (64, 16.3)]), first_draft=ONE_EACH, next_draft=ONE_EACH)
"""A verified token costs 1 % of a step, a drafted one 10 %."""
DEAR = StepCosts(verify=Curve([(1, 10.0), (2, 20.0)]), first_draft=ONE_EACH, next_draft=ONE_EACH)
"""A verified token costs as much as a step."""
FLAT_TO_8 = StepCosts(
    verify=Curve([(1, 10.0), (8, 10.0), (9, 20.0), (16, 27.0)]),
    first_draft=Curve([(1, 0.1)]),
    next_draft=Curve([(1, 0.1)]),
)
"""Eight tokens cost what one does; a ninth doubles it."""


def test_a_size_that_looks_dear_does_not_make_more_tokens_look_cheap() -> None:
    """What something else had the processor for at one size is no part of the costs."""
    true = [(1, 10.0), (2, 12.0), (4, 12.0), (8, 16.0), (16, 32.0), (24, 48.0), (32, 64.0)]
    disturbed = [(size, 60.0 if size == 24 else seconds) for size, seconds in true]
    curve, undisturbed = Curve(without_spikes(disturbed, start=8)), Curve(true)
    assert [curve(size) for size in range(40)] == pytest.approx([undisturbed(size) for size in range(40)])


@given(
    slopes=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=8),
    spikes=st.lists(st.floats(0.0, 50.0), min_size=9, max_size=9),
)
def test_costs_without_spikes_never_grow_less_with_more_tokens(slopes: list[float], spikes: list[float]) -> None:
    sizes = [8 * (place + 1) for place in range(len(slopes) + 1)]
    true = list(zip(sizes, accumulate((8 * slope for slope in sorted(slopes)), initial=10.0), strict=True))
    measured = [(size, seconds + spike) for (size, seconds), spike in zip(true, spikes, strict=False)]
    kept = without_spikes(measured, start=8)
    steps = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(kept)]
    assert steps == sorted(steps)
    assert (kept[0], kept[-1]) == (measured[0], measured[-1])
    curve = Curve(kept)
    assert all(curve(size) <= seconds + 1e-9 for size, seconds in measured)
    assert all(curve(size) >= seconds - 1e-9 for size, seconds in true)


def test_what_is_compiled_first_leaves_as_much_time_for_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels take longer to compile than all runs may; and its first run of each size records a graph."""
    now, runs = 0.0, list[tuple[str, int]]()

    def measure(table: str, size: int) -> tuple[float]:
        nonlocal now
        is_first, is_new = table not in dict(runs), (table, size) not in runs
        runs.append((table, size))
        seconds = 0.1 if is_new else 0.01
        now += 20.0 if is_first else seconds
        return (seconds,)

    monkeypatch.setattr(cost_meter, "time", SimpleNamespace(perf_counter=lambda: now))
    tables = [([1, 2, 4], partial(measure, table)) for table in ("drafts", "verified")]
    assert cost_meter._fastest(*tables) == [[(size, (0.01,)) for size in (1, 2, 4)]] * 2


def test_a_disturbed_run_of_a_slow_size_is_repeated_once_and_of_a_quick_one_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that a start is short, though sizes take a millisecond or half a second."""
    now, numbers = 0.0, dict.fromkeys((1, 64), 0)

    def measure(size: int) -> tuple[float]:
        nonlocal now
        numbers[size] += 1
        is_disturbed = numbers[size] < 3 if size == 1 else numbers[size] == 1
        seconds = 0.005 * size * (3 if is_disturbed else 1)
        now += seconds
        return (seconds,)

    monkeypatch.setattr(cost_meter, "time", SimpleNamespace(perf_counter=lambda: now))
    assert cost_meter._fastest(([1, 64], measure)) == [[(1, (0.005,)), (64, (0.32,))]]
    assert numbers[64] == 2 < numbers[1]


def rate(costs: StepCosts, chances: list[list[float]], lengths: list[int]) -> float:
    """Expected tokens a second, straight from the definition."""
    expected = sum(1 + sum(row[:length]) for row, length in zip(chances, lengths, strict=True))
    seconds = costs.verify(len(lengths) + sum(lengths))
    for place in range(max(lengths)):
        drafting = sum(length > place for length in lengths)
        seconds += (costs.next_draft if place else costs.first_draft)(drafting)
    return expected / seconds


def lengths_of(costs: StepCosts, chances: list[list[float]]) -> list[int]:
    return best_plan(costs, chances).lengths


def geometric(chance: float, limit: int) -> list[float]:
    return [chance**place for place in range(1, limit + 1)]


def lengths(
    policy: NamedPolicy,
    names: Sequence[str],
    limits: Sequence[int],
    num_joining: int = 0,
    repeats: dict[str, list[int]] | None = None,
    num_unread: int = 0,
) -> list[int]:
    of_names = dict(zip(names, limits, strict=True))
    return policy.lengths(of_names, num_joining, repeats=repeats, num_unread=num_unread)


def simulate(policy: NamedPolicy, acceptance: float, steps: int, limit: int = 6, batch: int = 1) -> list[list[int]]:
    """Run decode steps in which each draft is accepted with the given chance; returns all lengths."""
    chance = random.Random(0)
    ids = [str(index) for index in range(batch)]
    history = []
    for _ in range(steps):
        chosen = lengths(policy, ids, [limit] * batch)
        for request_id, length in zip(ids, chosen, strict=True):
            outcomes: list[bool] = []
            while len(outcomes) < length and all(outcomes):
                outcomes.append(chance.random() < acceptance)
            if length:
                policy.record_drafts(request_id, [], outcomes)
        history.append(chosen)
    return history


def mean_length(history: list[list[int]]) -> float:
    lengths = [length for lengths in history for length in lengths]
    return sum(lengths) / len(lengths)


def test_curves_are_linear_between_points_and_past_the_last() -> None:
    curve = Curve([(1, 10.0), (3, 14.0), (5, 14.0), (7, 20.0)])
    assert [curve(size) for size in (1, 2, 3, 4, 6, 8, 107)] == pytest.approx([10, 12, 14, 14, 17, 23, 320])


def test_a_curve_never_falls_past_its_last_point() -> None:
    assert Curve([(1, 10.0), (2, 8.0)])(100) == 8.0


def test_a_disturbed_size_before_the_last_does_not_make_all_larger_ones_free() -> None:
    assert Curve([(1, 10.0), (4, 13.0), (8, 25.0), (12, 21.0)])(34) == pytest.approx(21.0 + 22.0)


@pytest.mark.parametrize(("chance", "length"), [(0.05, 0), (0.3, 1), (0.5, 2), (0.95, 6)])
def test_more_is_drafted_where_more_is_accepted(chance: float, length: int) -> None:
    assert lengths_of(CHEAP, [geometric(chance, 6)]) == [length]


def test_nothing_is_drafted_where_verifying_costs_too_much() -> None:
    assert lengths_of(DEAR, [geometric(0.9, 6)] * 4) == [0] * 4


def test_likely_sequences_get_the_tokens_that_are_nearly_free() -> None:
    """Four sequences leave four free tokens."""
    chances = [geometric(0.9, 6), geometric(0.2, 6), geometric(0.2, 6), geometric(0.8, 6)]
    assert lengths_of(FLAT_TO_8, chances) == [3, 0, 0, 1]


def test_larger_batches_draft_less() -> None:
    totals = [sum(lengths_of(FLAT_TO_8, [geometric(0.7, 6)] * batch)) for batch in (1, 2, 4, 8)]
    assert totals == [6, 6, 4, 0]


@given(
    chances=st.lists(st.floats(0.01, 0.98), min_size=1, max_size=3),
    limits=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    verify=st.lists(st.floats(0.0, 3.0), min_size=12, max_size=12),
    draft=st.floats(0.01, 2.0),
)
def test_no_lengths_promise_more(chances: list[float], limits: list[int], verify: list[float], draft: float) -> None:
    """Where a draft costs the same in any batch, exhaustive search finds nothing better; gains below 3 % are left."""
    seconds = [5.0 + sum(verify[:index]) for index in range(12)]
    costs = StepCosts(
        Curve(list(enumerate(seconds, start=1))),
        first_draft=Curve([(1, draft), (2, 2 * draft)]),
        next_draft=Curve([(1, draft), (2, 2 * draft)]),
    )
    rows = [geometric(chance, limit) for chance, limit in zip(chances, limits, strict=False)]
    lengths = lengths_of(costs, rows)
    assert all(length <= len(row) for length, row in zip(lengths, rows, strict=True))
    without = rate(costs, rows, [0] * len(rows))
    options: list[list[int]] = [[]]
    for row in rows:
        options = [[*option, length] for option in options for length in range(len(row) + 1)]
    best = max(rate(costs, rows, option) for option in options)
    assert rate(costs, rows, lengths) == pytest.approx(best if best > 1.03 * without else without)
    assert best_plan(costs, rows).rate == pytest.approx(rate(costs, rows, lengths))


@given(
    chances=st.lists(st.floats(0.01, 0.98), min_size=1, max_size=3),
    limits=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    verify=st.lists(st.floats(0.0, 3.0), min_size=12, max_size=12),
    drafting=st.floats(0.0, 5.0),
)
def test_no_other_choice_of_drafts_to_verify_promises_more(
    chances: list[float], limits: list[int], verify: list[float], drafting: float
) -> None:
    curve = Curve([(index + 1, 5.0 + sum(verify[:index])) for index in range(12)])
    rows = [geometric(chance, limit) for chance, limit in zip(chances, limits, strict=False)]

    def promised(lengths: tuple[int, ...]) -> float:
        expected = sum(1 + sum(row[:length]) for row, length in zip(rows, lengths, strict=True))
        return expected / (curve(len(rows) + sum(lengths)) + drafting)

    best = max(map(promised, product(*(range(len(row) + 1) for row in rows))))
    assert promised(tuple(best_verified(curve, rows, drafting))) == pytest.approx(best)


def test_lengths_follow_the_acceptance_that_is_seen() -> None:
    policy = NamedPolicy(CHEAP)
    bad = simulate(policy, 0.1, 300)
    assert bad[0] != [0]  # new drafts are tried
    assert mean_length(bad[-100:]) < 0.3
    good = simulate(policy, 0.9, 2000)
    assert mean_length(good[-100:]) > 4.5


def test_drafting_for_a_few_waits_for_those_that_join() -> None:
    """Not drafted for eight, so not for one of them either while the others' prompts are computed."""
    policy = NamedPolicy(FLAT_TO_8)
    assert lengths(policy, ["a"], [6], num_joining=7) == [0]
    assert lengths(policy, ["a"], [6], num_joining=1)[0] > 0


def test_a_smaller_batch_is_drafted_for_at_once() -> None:
    policy = NamedPolicy(FLAT_TO_8)
    ids = [str(index) for index in range(8)]
    for _ in range(100):
        assert lengths(policy, ids, [6] * 8, 0) == [0] * 8
    assert lengths(policy, ids[:1], [6], 0)[0] > 0


def test_a_sequence_that_is_drafted_badly_does_not_stop_the_others() -> None:
    policy = NamedPolicy(CHEAP)
    for _ in range(30):
        good, bad = lengths(policy, ["good", "bad"], [4, 4], 0)
        policy.record_drafts("good", [], [True] * good)
        if bad:
            policy.record_drafts("bad", [], [False])
    assert lengths(policy, ["good", "bad"], [4, 4], 0) == [4, 0]


def test_speculation_that_cannot_pay_is_never_probed() -> None:
    assert not any(map(any, simulate(NamedPolicy(DEAR), 0.9, 2000, batch=4)))


def test_speculation_that_might_pay_is_probed_seldom() -> None:
    history = simulate(NamedPolicy(CHEAP), 0.0, 3000)[-2000:]
    assert 0 < sum(map(any, history)) < 100


def test_fewer_tokens_never_cost_more() -> None:
    """A first size that was measured while something else had the processor."""
    curve = Curve([(1, 5.0), (2, 3.0), (4, 4.0), (8, 7.0)])
    assert [curve(size) for size in (1, 2, 3, 4, 8, 10)] == [3.0, 3.0, 3.5, 4.0, 7.0, 8.5]


SURE, UNSURE = CONFIDENCE_LEVELS - 1, 0


def test_chains_that_can_end_early_have_room_to_the_limit() -> None:
    assert lengths(NamedPolicy(CHEAP), ["a"], [6], 0) == [4]
    assert lengths(NamedPolicy(CHEAP, stops_early=True), ["a"], [6], 0) == [6]
    assert lengths(NamedPolicy(DEAR, stops_early=True), ["a"], [6], 0) == [0]


def test_the_stop_rule_counts_in_tokens() -> None:
    """Ten tokens a second; the second of two chains' tokens costs 0.05 s to verify and 0.2 s to draft."""
    costs = StepCosts(
        Curve([(1, 0.1), (2, 0.2), (6, 0.4)]), first_draft=Curve([(1, 0.0)]), next_draft=Curve([(1, 0.2)])
    )
    policy = NamedPolicy(costs, stops_early=True)
    lengths(policy, ["a", "b"], [2, 2])
    for _ in range(200):
        policy.record_drafts("a", [], [False])
        policy.record_drafts("b", [], [False])
    assert lengths(policy, ["a", "b"], [2, 2], 0) == [0, 0]  # so the rate is that without drafts
    stop = policy.stop_rule({"a": 2, "b": 2})
    assert stop is not None
    assert stop.rule.verify_costs == pytest.approx([0.5, 0.5])
    assert stop.rule.draft_cost == pytest.approx(2.0)
    assert [len(places) for places in stop.acceptance.values()] == [2, 2]


def test_what_the_draft_is_sure_of_is_verified_and_the_rest_is_not() -> None:
    """A ninth token doubles the time of eight, so that one of two has to be dropped."""
    policy = NamedPolicy(FLAT_TO_8, stops_early=True)
    ids = [str(number) for number in range(6)]
    lengths(policy, ids, [1] * 6, 0)
    confidence = [UNSURE, SURE, UNSURE, SURE, UNSURE, UNSURE]
    proposals = [Proposal([TOKEN], confidence=[level]) for level in confidence]
    kept = policy.worth_verifying(dict(zip(ids, proposals, strict=True)))
    assert kept == {"0": 0, "1": 1, "2": 0, "3": 1, "4": 0, "5": 0}


def test_how_much_sureness_is_worth_is_learned_from_what_was_accepted() -> None:
    """A draft that is sure of nothing, and always right; greedy and sampled tokens are judged apart."""
    policy = NamedPolicy(CHEAP, stops_early=True)
    lengths(policy, ["a"], [1], 0)
    stops = [policy.stop_rule({"a": 1})]
    for _ in range(500):
        policy.record_drafts("a", [UNSURE], [True])
    stops.append(policy.stop_rule({"a": 1}))
    before, after = (stop.rule.chances[0] for stop in stops if stop is not None)
    assert before[0, UNSURE] < 0.3
    assert after[0, UNSURE] > 0.9
    assert after[1, UNSURE] == before[1, UNSURE]


def test_a_draft_that_was_dropped_is_judged_by_the_token_that_came() -> None:
    """Where nothing is verified, the chance of the first place is still learned: trials need no verification."""
    policy = NamedPolicy(FLAT_TO_8, stops_early=True)
    assert lengths(policy, ["a"], [6], 0) == [6]
    for _ in range(300):
        policy.record_drafts("a", [UNSURE], [False])
    assert lengths(policy, ["a"], [6], 0) == [0]


LONG, SHORT = [CONFIDENCE_LEVELS - 1] * 6, [1, 2, 3, 4, 5, 6]


def test_a_long_repeat_is_copied_where_drafts_cost_too_much() -> None:
    """As many tokens as are verified for nothing; a short repeat is not sure enough for the rest."""
    policy = NamedPolicy(FLAT_TO_8)
    ids = [str(number) for number in range(8)]
    lengths(policy, ids, [6] * 8)
    for _ in range(300):
        policy.record_drafts("0", [], [False])
    assert lengths(policy, ids[:6], [6] * 6, repeats={"1": LONG}) == [0, 2, 0, 0, 0, 0]
    lengths(policy, ids, [6] * 8, repeats={"1": SHORT})
    assert not policy.copied


def test_a_crowd_that_gets_no_drafts_is_looked_at_now_and_then_until_one_of_it_is_drafted_for() -> None:
    free = Curve([(1, 1.0)])
    policy = NamedPolicy(StepCosts(verify=free, first_draft=Curve([(1, 100.0)]), next_draft=Curve([(1, 100.0)])))
    ids = [str(number) for number in range(8)]
    rested = []
    for _ in range(56):
        rested.append(policy.policy.rests(len(ids)))
        if not rested[-1]:
            assert not any(lengths(policy, ids, [6] * 8))
    assert not any(rested[:16])
    assert sum(rested[16:]) == 30  # of 40
    assert not policy.policy.rests(7)
    assert [policy.policy.rests(len(ids)) for _ in range(20)].count(False) == 17
    lengths(policy, ids, [6] * 8, repeats={"1": LONG})
    assert policy.copied == {"1"}
    assert not any(policy.policy.rests(len(ids)) for _ in range(16))


def test_copies_are_judged_by_what_became_of_them_also_where_none_was_taken() -> None:
    policy = NamedPolicy(CHEAP)
    policy.request("sampled", temperature=1.0)
    lengths(policy, ["a", "sampled"], [6, 6])
    for name in ("a", "sampled") * 300:
        policy.record_copy(name, LONG, [False])
    lengths(policy, ["a"], [6], repeats={"a": LONG})
    assert not policy.copied
    for _ in range(300):
        policy.record_copy("a", LONG, [True] * 6)
    assert lengths(policy, ["a"], [6], repeats={"a": LONG}) == [6]
    assert policy.copied == {"a"}
    lengths(policy, ["sampled"], [6], repeats={"sampled": LONG})
    assert not policy.copied  # sampled ones are judged apart


def test_drafts_that_are_better_where_a_text_repeats_are_drafted_there() -> None:
    policy = NamedPolicy(CHEAP)
    lengths(policy, ["a"], [6])
    for _ in range(300):
        policy.record_copy("a", SHORT, [False])
        policy.record_drafts("a", [], [True] * 4, SHORT)
        policy.record_drafts("a", [], [False])
    assert lengths(policy, ["b"], [6]) < lengths(policy, ["b"], [6], repeats={"b": SHORT})


def test_a_text_is_read_for_drafts_only_where_they_promise_more_than_that_takes() -> None:
    """Eight sequences gain little by drafts; one gains much more than it takes to read its text."""
    costs = StepCosts(Curve([(1, 10.0), (8, 15.0), (24, 31.0)]), Curve([(1, 0.5)]), Curve([(1, 0.5)]), read=0.05)
    for batch, num_unread, drafts in ((8, 0, True), (8, 20, True), (8, 400, False), (1, 400, True), (1, 10_000, False)):
        ids = [str(number) for number in range(batch)]
        assert any(lengths(NamedPolicy(costs), ids, [4] * batch, num_unread=num_unread)) == drafts, (batch, num_unread)


def test_a_text_that_was_read_is_drafted_for_beside_those_that_are_not_worth_it() -> None:
    costs = StepCosts(Curve([(1, 10.0), (8, 15.0), (24, 31.0)]), Curve([(1, 0.5)]), Curve([(1, 0.5)]), read=0.05)
    policy = NamedPolicy(costs)
    candidates = [Candidate(policy.request(str(number)), 4, 3 if number < 4 else 400) for number in range(8)]
    most = [length.num_tokens for length in policy.policy.lengths(candidates, 0)]
    assert all(most[:4])
    assert not any(most[4:])


def test_drafts_that_take_longer_than_expected_are_left_out_and_tried_again() -> None:
    """A draft, right one time in three, pays if it takes what was measured, but not if it takes four times as long."""
    policy = NamedPolicy(CHEAP)
    history = []
    for step in range(1200):
        history.append(lengths(policy, ["a"], [1])[0])
        if history[-1]:
            policy.worth_verifying({"a": Proposal([TOKEN])})
            policy.record_drafts("a", [], [step % 3 == 0])
            policy.policy.record_seconds(4.0)
    assert all(history[:5])
    last = history[600:]
    assert 0 < sum(map(bool, last)) < len(last) / 4


def test_drafts_that_take_what_was_expected_or_less_change_nothing() -> None:
    costs = ServedCosts(CHEAP)
    for seconds in (2.0, 0.1) * 50:
        costs.correct(2.0, seconds)
    costs.correct(0.0, 5.0)  # nothing was drafted
    assert [costs.first_draft(size) for size in (1, 2)] == [1.0, 2.0]


def test_a_step_that_takes_more_than_it_was_measured_to_makes_drafts_worth_more() -> None:
    """What a step costs anyhow is shared by all of its tokens; what one more costs stays what it was."""
    costs = ServedCosts(CHEAP)
    before = [costs.verify(size) for size in (1, 2, 8)]
    for _ in range(200):
        costs.correct_rest(2, before[1] + 5.0)
    after = [costs.verify(size) for size in (1, 2, 8)]
    assert [now - then for now, then in zip(after, before, strict=True)] == pytest.approx([5.0] * 3, rel=0.01)
    for _ in range(500):
        costs.correct_rest(1, 0.5 * before[0])  # never cheaper than measured
    assert [costs.verify(size) for size in (1, 2, 8)] == pytest.approx(before, abs=0.01)
    dear = StepCosts(verify=Curve([(1, 1.0), (8, 8.0)]), first_draft=Curve([(1, 0.5)]), next_draft=Curve([(1, 0.5)]))
    policy = NamedPolicy(dear)
    for _ in range(200):
        policy.record_drafts("a", [], [True])
    assert lengths(policy, ["a"], [6]) == [0]
    for _ in range(200):
        policy.policy.record_step(1, 4.0)
    assert lengths(policy, ["a"], [6])[0] > 0


def test_costs_follow_what_drafts_take_but_not_a_single_step() -> None:
    costs = ServedCosts(CHEAP)
    costs.correct(1.0, 1000.0)
    assert costs.first_draft(1) < 1.2
    for _ in range(300):
        costs.correct(costs.first_draft(2) + costs.next_draft(2), 8.0)
    assert [costs.first_draft(1), costs.next_draft(2)] == pytest.approx([2.0, 4.0], rel=0.02)
    for _ in range(3000):
        costs.idle()
    assert costs.first_draft(1) == pytest.approx(1.0, rel=0.02)
