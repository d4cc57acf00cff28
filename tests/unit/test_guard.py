"""The guard's decisions: how often it is wrong, and how soon it is right."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_replay import record

from adapters.guard import Acceptance, Guard, Verdict, judge
from adapters.pace import Pacer
from adapters.scoring import Score
from adapters.trigger import UpdateTrigger
from engine.adapters_config import GuardConfig, PaceConfig

CONFIG = GuardConfig()
ACCEPTED, REFUSED = record(1, [1, 2, 3, 4], 2), record(1, [1, 2], 0)
FAIR = {
    (version, is_right): msgspec.structs.replace(
        ACCEPTED if is_right else REFUSED, draft_version=version, is_gated=False
    )
    for version in (0, 1, 2)
    for is_right in (False, True)
}


def watched(before: float, now: float, control: float, seed: int, steps: int = 4 * CONFIG.watched_records) -> int:
    """Records of the version in force until it is taken back; 0: it is not."""
    guard, chance = Guard(CONFIG), np.random.default_rng(seed)
    guard.watch(1)
    for is_right in chance.random(CONFIG.watched_records) < before:
        guard.observe(FAIR[1, bool(is_right)])
    guard.watch(2)
    mine, theirs = chance.random(steps) < now, chance.random(steps) < control
    for step in range(steps):
        if step % 4 == 0:
            guard.observe(FAIR[0, bool(theirs[step])])
        if guard.observe(FAIR[2, bool(mine[step])]):
            return step + 1
    return 0


def test_an_equal_version_is_hardly_ever_taken_back() -> None:
    """Four times the watched records, 64 looks: less than one version in a hundred, a better one never."""
    alarms = sum(watched(0.5, 0.5, 0.5, seed) > 0 for seed in range(300))
    assert alarms <= 3
    assert sum(watched(0.5, 0.6, 0.5, seed) > 0 for seed in range(100)) == 0


def test_harder_traffic_is_no_fault_of_the_version() -> None:
    """Everything falls by a tenth, base and adapter alike."""
    assert sum(watched(0.6, 0.5, 0.5, seed) > 0 for seed in range(100)) <= 1


def test_bad_versions_are_taken_back_soon() -> None:
    broken = [watched(0.5, 0.02, 0.4, seed) for seed in range(50)]
    assert all(0 < found <= 64 for found in broken)
    worse_than_base = [watched(0.5, 0.3, 0.5, seed) for seed in range(50)]
    assert all(worse_than_base)
    assert np.median(worse_than_base) <= 512


def test_only_fair_records_of_the_version_in_force_count() -> None:
    guard = Guard(CONFIG)
    guard.watch(2)
    guard.observe(FAIR[1, False])
    guard.observe(msgspec.structs.replace(FAIR[2, False], is_gated=True))
    guard.observe(msgspec.structs.replace(FAIR[2, True], drafted=(), num_accepted=0))
    guard.observe(msgspec.structs.replace(FAIR[2, True], copied=True))
    assert (guard.num_watched, guard.acceptance, guard.control) == (0, Acceptance(), Acceptance())
    guard.observe(FAIR[2, True])
    guard.observe(FAIR[0, False])
    assert (guard.acceptance, guard.control) == (Acceptance(1, 1), Acceptance(0, 1))
    assert not guard.may_be_followed


@given(st.integers(0, 200), st.integers(0, 200))
def test_few_records_prove_nothing(right: int, wrong: int) -> None:
    few, many = Acceptance(0, 31), Acceptance(right, right + wrong)
    assert not few.is_below(many, 0.0, 3.0)
    assert not many.is_below(many, 0.0, 3.0)


def scored(loss: float, *accepted: float, num_requests: int = 50) -> Score:
    """Chains of these numbers of tokens, 50 times, the neighbours among them of one request."""
    tokens = torch.tensor(accepted, dtype=torch.float32).repeat(50)
    requests = torch.arange(len(tokens)) * num_requests // len(tokens)
    return Score(float(tokens.mean()), loss, tokens, requests)


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (scored(1.0, 1, 2, 1, 2), Verdict.PUBLISH),
        (scored(2.0, 1, 2, 1, 2), Verdict.REFUSE),  # no better by loss
        (scored(float("nan"), 1, 2, 1, 2), Verdict.REFUSE),
        (scored(1.0, 0, 1, 1, 1), Verdict.REFUSE),  # surely accepted less
        (scored(1.0, 1, 1, 1, 1), Verdict.TRAIN_ON),
    ],
)
def test_versions_are_judged_by_what_would_be_accepted(candidate: Score, verdict: Verdict) -> None:
    now = scored(2.0, 1, 1, 1, 1)
    assert judge(candidate, now, now, CONFIG)[0] is verdict


def test_chains_of_few_requests_are_no_proof() -> None:
    """200 chains each: of 50 requests half of which gain a token, of 5 one of which does, of 3 and 1 that all do."""
    few, all_gain = Verdict.TRAIN_ON, 1
    for num_requests, every, verdict in ((50, 2, Verdict.PUBLISH), (5, 5, few), (3, all_gain, few), (1, all_gain, few)):
        now = scored(2.0, 1, 1, 1, 1, num_requests=num_requests)
        gained = (now.requests % every == 0).float()
        candidate = Score(float((now.accepted + gained).mean()), 1.0, now.accepted + gained, now.requests)
        assert judge(candidate, now, now, CONFIG)[0] is verdict, num_requests


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (scored(1.0, 2, 2, 1, 2), Verdict.PUBLISH),  # surely more than the base, and somewhat more than now
        (scored(1.0, 1, 2, 2, 1), Verdict.TRAIN_ON),  # no more than now
        (scored(2.0, 2, 2, 2, 2), Verdict.REFUSE),
    ],
)
def test_small_steps_from_one_good_version_to_the_next_are_taken(candidate: Score, verdict: Verdict) -> None:
    base, now = scored(3.0, 1, 1, 1, 1), scored(2.0, 1, 2, 1, 2)
    assert judge(candidate, now, base, CONFIG)[0] is verdict


def test_version_better_than_a_bad_one_must_not_be_worse_than_the_base() -> None:
    found, reason = judge(scored(1.0, 1, 1, 1, 0), scored(2.0, 0, 0, 0, 0), scored(2.0, 1, 1, 1, 1), CONFIG)
    assert found is Verdict.REFUSE
    assert "base" in reason


def test_updates_stop_where_they_do_not_pay_and_resume_when_acceptance_falls() -> None:
    clock = [0.0]
    trigger = UpdateTrigger(PaceConfig(), batch_positions=64, clock=lambda: clock[0])
    assert not trigger.wants_update(63)
    assert trigger.wants_update(64)
    for _ in range(120):  # ten steps a second
        clock[0] += 1
        trigger.observe_steps(10)
    trigger.observe_update(2.0)
    trigger.observe_acceptance(0.6)
    assert trigger.wants_update(64)  # 0.05 · 10 · 600 · 0.02 = 6 s > 2 s
    for _ in range(20):
        trigger.observe_score(0.0, 8)
    assert not trigger.wants_update(64 * 63)
    assert trigger.wants_update(64 * 64)
    trigger.observe_acceptance(0.5)
    assert trigger.wants_update(64)


def test_training_takes_no_more_than_its_share_of_a_busy_machine() -> None:
    clock, spare = [0.0], [0.0]
    pacer = Pacer(PaceConfig(busy_share=0.03), lambda: spare[0], lambda: clock[0])
    trained = 0.0
    while clock[0] < 1000:
        if pacer.may_run():
            clock[0] += 0.3
            trained += 0.3
            pacer.ran(0.3)
        clock[0] += 0.1
    assert 0.025 * 1000 < trained < 0.0305 * 1000
    assert not pacer.may_run()
    spare[0] = 1.0
    assert pacer.may_run()
    never = Pacer(PaceConfig(busy_share=0.0), lambda: None, lambda: clock[0])
    never.ran(0.1)
    assert not never.may_run()
