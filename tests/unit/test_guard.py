"""The guard's decisions: how often it is wrong, and how soon it is right."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator

from evospec.adapters.alignment.guard import FirstTokenAcceptance, Guard, Verdict, judge
from evospec.adapters.alignment.pace import Pacer
from evospec.adapters.alignment.scoring import Score
from evospec.adapters.alignment.trigger import UpdateTrigger
from evospec.engine.adapters_config import GuardConfig, PaceConfig
from evospec.engine.online.verify_record import VerifyRecord
from tests.unit.test_replay import record

CONFIG = GuardConfig()
ACCEPTED, REFUSED = record(1, [1, 2, 3, 4], 2), record(1, [1, 2], 0)
SPREAD = 0.15
"""Standard deviation of acceptance over requests: the text of some is easier."""
CLIENTS = 4


def sampled(version: int, is_right: bool, request_id: str = "r") -> VerifyRecord:
    like = ACCEPTED if is_right else REFUSED
    return msgspec.structs.replace(
        like, draft_version=version, is_hard_example=False, request_id=request_id, first_right=is_right
    )


def traffic(version: int, rate: float, base: float, control_share: float, chance: Generator) -> Iterator[VerifyRecord]:
    """Steps of some clients' requests, about 50 each, those of control requests by the base draft (version 0)."""
    live: dict[int, tuple[str, int, float, int]] = {}
    for number in itertools.count():
        client = int(chance.integers(CLIENTS))
        if client not in live:
            is_control = chance.random() < control_share
            ease = chance.normal(base if is_control else rate, SPREAD if min(base, rate) > SPREAD else 0.0)
            live[client] = f"{version}-{number}", 0 if is_control else version, ease, 1 + int(chance.poisson(49))
        request_id, drafted_by, ease, left = live.pop(client)
        yield sampled(drafted_by, chance.random() < ease, request_id)
        if left > 1:
            live[client] = request_id, drafted_by, ease, left - 1


def watched(before: float, now: float, base: float, seed: int, steps: int = 2048, control_share: float = 0.05) -> int:
    """Records of the version in force until it is taken back; 0: it is not."""
    guard, chance = Guard(CONFIG), np.random.default_rng(seed)
    guard.watch(1)
    for one in itertools.islice(traffic(1, before, base, control_share, chance), CONFIG.watched_records):
        guard.is_bad_after(one)
    guard.watch(2)
    of_version = 0
    for one in traffic(2, now, base, control_share, chance):
        of_version += one.draft_version == 2
        if guard.is_bad_after(one):
            return of_version
        if of_version == steps:
            return 0
    raise AssertionError("traffic has no end")


def test_an_equal_version_is_hardly_ever_taken_back() -> None:
    """Four times the watched records, 64 looks: in none of 300 runs, with five times the controls in 4.

    Where steps were taken for independent, in 20 of 100. Eight times as many looks, in 6 of 100.
    """
    assert sum(watched(0.55, 0.55, 0.55, seed) > 0 for seed in range(100)) <= 2
    assert sum(watched(0.55, 0.55, 0.55, seed, control_share=0.25) > 0 for seed in range(50)) <= 3
    assert sum(watched(0.5, 0.6, 0.5, seed) > 0 for seed in range(50)) == 0


def test_harder_traffic_is_no_fault_of_the_version() -> None:
    """Everything falls by a tenth, base and adapter alike."""
    assert sum(watched(0.6, 0.5, 0.5, seed) > 0 for seed in range(50)) <= 2


def test_traffic_that_gets_harder_later_is_no_fault_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything falls by 0.15 after 4,096 steps: both are compared over the same stretch of it.

    In none of 100 runs. Where the last 512 steps of either were compared, which take the base draft 19 times as long,
    in 36.
    """
    monkeypatch.setattr(sys.modules[__name__], "SPREAD", 0.05)

    def is_taken_back(seed: int) -> bool:
        guard, chance = Guard(CONFIG), np.random.default_rng(seed)
        guard.watch(1)
        easy = itertools.islice(traffic(1, 0.65, 0.65, 0.05, chance), 4096)
        hard = itertools.islice(traffic(1, 0.5, 0.5, 0.05, chance), 2048)
        return any(guard.is_bad_after(one) for one in itertools.chain(easy, hard))

    assert sum(is_taken_back(seed) for seed in range(20)) == 0


def test_bad_versions_are_taken_back_soon() -> None:
    broken = [watched(0.55, 0.05, 0.55, seed) for seed in range(50)]
    assert all(0 < found <= 256 for found in broken)
    worse_than_base = [watched(0.55, 0.3, 0.55, seed, steps=4096, control_share=0.25) for seed in range(50)]
    assert sum(found > 0 for found in worse_than_base) >= 45
    assert np.median(worse_than_base) <= 1500


def test_a_version_met_by_few_is_none_to_compare_with() -> None:
    """Nor does it take the place of one that was met by many: a bad one after it is found by that."""
    guard, chance = Guard(CONFIG), np.random.default_rng(0)
    guard.watch(1)
    for one in itertools.islice(traffic(1, 0.6, 0.6, 0.0, chance), CONFIG.watched_records):
        guard.is_bad_after(one)
    guard.watch(2)
    for number in range(3):
        guard.is_bad_after(sampled(2, True, f"{number}"))
    guard.watch(3)
    assert any(guard.is_bad_after(one) for one in itertools.islice(traffic(3, 0.05, 0.6, 0.0, chance), 512))


def test_only_unbiased_records_of_the_version_in_force_count() -> None:
    guard = Guard(CONFIG)
    guard.watch(2)
    not_asked = msgspec.structs.replace(sampled(2, True), first_right=None, drafted=(), num_accepted=0)
    guard.is_bad_after(sampled(1, False))
    guard.is_bad_after(msgspec.structs.replace(sampled(2, False), is_hard_example=True))
    guard.is_bad_after(not_asked)
    guard.is_bad_after(msgspec.structs.replace(sampled(2, True), first_right=None, copied=True))
    assert (guard.num_watched, guard.acceptance, guard.control) == (0, FirstTokenAcceptance(), FirstTokenAcceptance())
    guard.is_bad_after(sampled(2, True))
    guard.is_bad_after(sampled(0, False))
    of_older_engine = msgspec.structs.replace(sampled(0, False), first_right=None)
    guard.is_bad_after(of_older_engine)
    assert (guard.acceptance, guard.control) == (FirstTokenAcceptance(((1, 1),)), FirstTokenAcceptance(((0, 2),)))
    assert not guard.may_be_followed


@given(st.integers(0, 200), st.integers(0, 200))
def test_few_records_prove_nothing(right: int, wrong: int) -> None:
    many = FirstTokenAcceptance(((right, right + wrong),) * 8)
    for few in (FirstTokenAcceptance(((0, 1),) * 31), FirstTokenAcceptance(((0, 1000),) * 3)):
        assert not few.is_below(many, 0.0, 3.0)
        assert not many.is_below(few, 0.0, 3.0)
    assert not many.is_below(many, 0.0, 3.0)


def scored(loss: float, *accepted: float, num_requests: int = 50, spread: float = 0.0) -> Score:
    """Chains of these numbers of tokens, 50 times, the neighbours among them of one request; the requests' losses are
    ``spread`` apart."""
    tokens = torch.tensor(accepted, dtype=torch.float32).repeat(50)
    requests = torch.arange(len(tokens)) * num_requests // len(tokens)
    losses = loss + spread * (requests % 2 - 0.5)
    return Score(tokens, losses, requests)


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (scored(1.0, 1, 2, 1, 2), Verdict.PUBLISH),
        (scored(2.1, 1, 2, 1, 2), Verdict.REFUSE),  # surely a greater loss
        (scored(2.1, 1, 2, 1, 2, spread=1.0), Verdict.TRAIN_ON),  # by chance, perhaps
        (scored(2.0, 1, 2, 1, 2), Verdict.TRAIN_ON),
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
        candidate = Score(now.accepted + gained, now.losses - 1.0, now.requests)
        assert judge(candidate, now, now, CONFIG)[0] is verdict, num_requests


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (scored(1.0, 2, 2, 1, 2), Verdict.PUBLISH),  # surely more than the base, and somewhat more than now
        (scored(1.0, 1, 2, 2, 1), Verdict.TRAIN_ON),  # no more than now
        (scored(2.0, 2, 2, 2, 2), Verdict.TRAIN_ON),
    ],
)
def test_small_steps_from_one_good_version_to_the_next_are_taken(candidate: Score, verdict: Verdict) -> None:
    base, now = scored(3.0, 1, 1, 1, 1), scored(2.0, 1, 2, 1, 2)
    assert judge(candidate, now, base, CONFIG)[0] is verdict


def test_version_better_than_a_bad_one_must_not_be_worse_than_the_base() -> None:
    found, reason = judge(scored(1.0, 1, 1, 1, 0), scored(2.0, 0, 0, 0, 0), scored(2.0, 1, 1, 1, 1), CONFIG)
    assert found is Verdict.REFUSE
    assert "base" in reason


def test_a_draft_that_grows_is_put_in_force_once_it_pays_and_replaced_by_much_better_ones() -> None:
    config, none = GuardConfig(min_agreement=0.6, min_gain=0.1), scored(9.0, 0, 0, 0, 0)
    half, more, most = scored(2.0, 1, 0, 1, 0), scored(1.9, 1, 0, 1, 1), scored(1.8, 1, 1, 1, 1)
    assert judge(half, none, none, config)[0] is Verdict.TRAIN_ON
    assert judge(more, none, none, config)[0] is Verdict.PUBLISH
    assert judge(most, more, none, config)[0] is Verdict.PUBLISH
    assert judge(most, more, none, GuardConfig(min_gain=0.3))[0] is Verdict.TRAIN_ON


def test_a_draft_that_grows_is_judged_by_all_its_steps() -> None:
    """Unrolled, its first step gets a greater loss while more of its tokens are right."""
    one_step, unrolled = scored(2.0, 1, 1, 1, 2), scored(2.1, 1, 2, 1, 2)
    assert judge(unrolled, one_step, one_step, CONFIG)[0] is Verdict.REFUSE
    by_acceptance = unrolled.by_acceptance(), one_step.by_acceptance()
    assert judge(*by_acceptance, one_step.by_acceptance(), CONFIG)[0] is Verdict.PUBLISH
    saved = 1 - math.exp(by_acceptance[0].loss - by_acceptance[1].loss)
    assert saved == pytest.approx(1 - (2 * 2 * 2 * 3) ** 0.25 / (2 * 3 * 2 * 3) ** 0.25), "share of verifications"
    assert judge(one_step.by_acceptance(), by_acceptance[0], one_step.by_acceptance(), CONFIG)[0] is Verdict.REFUSE


@pytest.mark.parametrize(("rate", "is_bad"), [(0.01, True), (0.2, False)])
def test_a_draft_without_a_base_is_bad_below_a_fixed_acceptance(rate: float, is_bad: bool) -> None:
    guard = Guard(GuardConfig(min_acceptance=0.1))
    guard.watch(1)
    records = itertools.islice(traffic(1, rate, 1.0, 0.0, np.random.default_rng(0)), 512)
    assert any(guard.is_bad_after(one) for one in records) is is_bad


def test_updates_stop_where_they_do_not_pay_and_resume_when_acceptance_falls() -> None:
    clock = [0.0]
    trigger = UpdateTrigger(PaceConfig(outlook_seconds=600), batch_positions=64, clock=lambda: clock[0])
    assert not trigger.wants_update(63, 63)
    assert trigger.wants_update(64, 64)
    for _ in range(1800):  # ten steps a second
        clock[0] += 1
        trigger.add_steps(10)
    trigger.add_update(2.0)
    trigger.compare_acceptance(steady(0.6))
    assert trigger.wants_update(64, 64)  # 0.05 · 10 · 600 · 0.02 = 6 s > 2 s
    trigger.add_score(0.4, 8, scoring_seconds=15.0)
    assert not trigger.wants_update(64, 64)  # 2 s and 0.3 · 15 s
    trigger.add_score(0.4, 8)
    assert trigger.wants_update(64, 64)
    for _ in range(20):
        trigger.add_score(0.0, 8)
    assert not trigger.wants_update(64 * 7, 64 * 7)
    assert trigger.wants_update(64, 64, machine_is_idle=True)
    assert not trigger.wants_update(63, 64, machine_is_idle=True)
    assert trigger.wants_update(64, 64 * 8)
    assert trigger.wants_update(48, 64 * 8)  # answers so short that no more is kept
    trigger.compare_acceptance(steady(0.56))
    assert not trigger.wants_update(64, 64)
    trigger.compare_acceptance(steady(0.4))
    assert trigger.wants_update(64, 64)


def test_a_pause_of_minutes_does_not_stop_the_updates_that_are_owed() -> None:
    clock = [0.0]
    trigger = UpdateTrigger(PaceConfig(outlook_seconds=3600), batch_positions=64, clock=lambda: clock[0])
    trigger.add_update(2.0)
    for _ in range(300):  # ten steps a second
        clock[0] += 1
        trigger.add_steps(10)
    assert trigger.pays  # 0.05 · 10 · 3600 · 0.02 = 36 s > 2 s
    for _ in range(300):
        clock[0] += 1
        trigger.add_steps(0)
    assert trigger.pays
    for _ in range(3600):
        clock[0] += 1
        trigger.add_steps(0)
    assert not trigger.pays


def test_a_fall_is_seen_after_a_score_of_which_too_little_was_known() -> None:
    """As right after a new version, when nobody has met it."""
    for known in ([steady(0.7), FirstTokenAcceptance()], [FirstTokenAcceptance(), steady(0.7)]):
        trigger = UpdateTrigger(PaceConfig(), batch_positions=64)
        for acceptance in known:
            trigger.compare_acceptance(acceptance)
            trigger.add_update(2.0)
            trigger.add_score(0.0, 8)
        for _ in range(20):
            trigger.add_score(0.0, 8)
        trigger.compare_acceptance(steady(0.7))
        assert trigger._patience > 1
        trigger.compare_acceptance(steady(0.3))
        assert trigger._patience == 1


def steady(rate: float) -> FirstTokenAcceptance:
    """Of 20 requests of 50 steps, equally easy."""
    return FirstTokenAcceptance(tuple((round(50 * rate), 50) for _ in range(20)))


def test_a_key_with_the_same_traffic_all_the_time_is_left_alone() -> None:
    """Looked at every 20 records of the base draft; of 40 runs of 20,000 records one may see a fall that is none."""
    woken = 0
    for seed in range(40):
        guard, trigger = Guard(CONFIG), UpdateTrigger(PaceConfig(), batch_positions=64)
        chance = np.random.default_rng(seed)
        for number, one in enumerate(itertools.islice(traffic(0, 0.55, 0.55, 0.0, chance), 20_000)):
            guard.is_bad_after(one)
            if number % 20 == 0:
                trigger.compare_acceptance(guard.in_force)
            if number % 2000 == 1000:
                woken += number > 1000 and trigger._patience == 1
                trigger.add_update(2.0)
                for _ in range(20):
                    trigger.add_score(0.0, 8)
    assert woken <= 1


def test_training_takes_no_more_than_its_share_of_a_busy_machine() -> None:
    clock, spare = [0.0], [0.0]
    pacer = Pacer(PaceConfig(busy_share=0.03, spare_cores=0.5), lambda: spare[0], lambda: clock[0])
    trained = 0.0
    while clock[0] < 1300:
        if pacer.may_run():
            assert clock[0] >= 300  # until then it may yet be idle
            clock[0] += 0.3
            trained += 0.3
            pacer.ran(0.3)
        clock[0] += 0.1
    assert 0.025 * 1000 < trained < 0.0305 * 1000
    assert not pacer.may_run()
    spare[0] = 1.0
    assert pacer.may_run()
    pacer.ran(0.3)
    spare[0] = 0.0
    clock[0] += 299
    assert not pacer.may_run()
    clock[0] += 2
    assert pacer.may_run()
    default = Pacer(PaceConfig(), lambda: spare[0], lambda: clock[0])
    default.ran(0.3)
    num_cores = len(os.sched_getaffinity(0))
    spare[0] = num_cores - 0.5
    assert not default.may_run()
    spare[0] = num_cores - 0.1
    assert default.may_run()
    never = Pacer(PaceConfig(busy_share=0.0), lambda: None, lambda: clock[0])
    never.ran(0.1)
    assert not never.may_run()


@pytest.mark.parametrize(("seconds", "expected"), [(0.05, [0, 10, 20, 30]), (0.2, [0, 20])])
def test_a_busy_machine_takes_in_the_log_now_and_then_and_an_idle_one_at_once(
    seconds: float, expected: list[int]
) -> None:
    """Each ten seconds, unless that is more than one percent of the time."""
    clock, spare = [0.0], [0.0]
    pacer = Pacer(PaceConfig(spare_cores=0.5), lambda: spare[0], lambda: clock[0])
    readings = []
    while clock[0] < 35:
        if pacer.may_read():
            readings.append(clock[0])
            pacer.took_in(seconds)
        clock[0] += 1
    assert readings == expected
    spare[0] = 1.0
    assert pacer.may_read()
    assert pacer.may_read()
