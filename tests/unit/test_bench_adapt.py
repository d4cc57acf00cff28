"""The pure parts of the alignment benchmark: prompts kept apart, sides' names, what answers come to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.adapt.__main__ import stages
from benchmarks.adapt.parts import PARTS
from benchmarks.adapt.record import HELD_OUT, RETURN, STREAM, Plan
from benchmarks.adapt.report import table
from benchmarks.adapt.sides import FORGETFUL, SIDES, Vocabularies, arguments, make_side
from benchmarks.adapt.summary import length, lost_share, paired, ratio, ratio_error, smoothed, speed, summary
from benchmarks.alignment_replay.worker import configured
from benchmarks.common.drafting import Drafting
from benchmarks.prompts.build import EVAL_PATH, Prompt, read
from benchmarks.prompts.streams import build_stream, in_turn, stream_and_trial
from server.settings import load_settings

VOCABULARIES = Vocabularies("static:4096", "dynamic:2048+1024")
DRAFTING = Drafting("eagle3", None, 4, adaptive=False)
counts = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 200)), min_size=2, max_size=20)


def prompt(name: str) -> Prompt:
    return Prompt(name, "law", "stream", [], "", "", "")


def answer(side: str = "a", steps: int = 10, accepted: int = 10, **labels: Any) -> dict[str, Any]:
    values = {"side": side, "phase": HELD_OUT, "tenant": "law", "domain": "law", "prompt": "p", "at": 0.0}
    return values | {"seconds": 1.0, "tokens": 20, "steps": steps, "accepted": accepted, "version": 0} | labels


def record(part: str, sides: list[str], **content: Any) -> dict[str, Any]:
    plan = {"part": part, "sides": sides, "domains": ["law", "code"], "model": "m", "max_tokens": 8}
    return {"plan": plan, "answers": [], "states": [], "runs": []} | content


def test_offline_updates_pay_unless_the_price_of_a_step_is_given() -> None:
    assert configured([]).pace.step_seconds > 1e9
    given = configured(["pace.step_seconds=0.02", "log.context_tokens=0"])
    assert (given.pace.step_seconds, given.log.context_tokens) == (0.02, 0)


def test_no_stream_prompt_is_or_quotes_an_evaluation_prompt() -> None:
    """On the real packages."""
    evaluation = read(EVAL_PATH)
    stream = build_stream(evaluation)
    assert {p.domain for p in stream} == {"code", "law", "medicine"}
    assert {p.split for p in stream} == {"stream"}
    assert {p.id for p in stream}.isdisjoint(p.id for p in evaluation)
    assert {p.messages[0]["content"] for p in stream}.isdisjoint(p.messages[0]["content"] for p in evaluation)

    def runs_of_eight(one: Prompt) -> set[tuple[str, ...]]:
        words = re.findall(r"[^\W_]+", one.passage.lower())
        return {tuple(words[start : start + 8]) for start in range(max(1, len(words) - 7))}

    seen = set().union(*(runs_of_eight(p) for p in evaluation))
    assert [p.id for p in stream if len((runs := runs_of_eight(p)) & seen) >= 0.3 * len(runs)] == []


@given(st.integers(0, 100))
def test_trial_prompts_are_not_learned_from(count: int) -> None:
    prompts = [prompt(str(number)) for number in range(count)]
    stream, trial = stream_and_trial(prompts)
    assert sorted([*stream, *trial], key=lambda p: int(p.id)) == prompts
    assert len(trial) == count // 6


def test_sources_come_in_turn() -> None:
    lists = [[prompt("a1"), prompt("a2"), prompt("a3")], [prompt("b1")]]
    assert [p.id for p in in_turn(lists)] == ["a1", "b1", "a2", "a3"]


def test_a_side_is_a_vocabulary_and_options_of_alignment() -> None:
    side = make_side("alignment/key_scope=global,training.beta=0", VOCABULARIES, ["training.beta=1", "rank=8"])
    assert (side.vocabulary, side.follows_sessions, side.aligns, side.key_scope) == (
        "static:4096",
        False,
        True,
        "global",
    )
    assert side.options == {"training.beta": "0", "rank": "8", "key_scope": "global"}
    osd = make_side("osd", VOCABULARIES)
    assert (osd.trains_all_weights, osd.key_scope) == (True, "global")
    vocabulary = make_side("vocabulary", VOCABULARIES, ["rank=8"])
    assert (vocabulary.vocabulary, vocabulary.follows_sessions, vocabulary.options) == ("dynamic:2048+1024", True, {})


@pytest.mark.parametrize("name", ["none", "static/rank=8", "alignment/rank"])
def test_a_side_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected|no such side"):
        make_side(name, VOCABULARIES)


@pytest.mark.parametrize("name", sorted({side for sides in SIDES.values() for side in sides}))
def test_all_default_sides_are_options_that_the_server_knows(name: str, tmp_path: Path) -> None:
    side = make_side(name, VOCABULARIES)
    engine = load_settings(arguments(side, "smollm2-135m", DRAFTING, tmp_path, tmp_path), experiments=True).engine
    assert engine.speculation.vocabulary == side.vocabulary
    assert not engine.speculation.adaptive
    assert engine.alignment.enabled == side.aligns
    if side.aligns:
        assert engine.alignment.state_directory == tmp_path
    if FORGETFUL in name:
        assert (engine.alignment.training.history_share, engine.alignment.training.updates_per_batch) == (0, 1)


@given(counts, counts)
def test_acceptance_is_of_all_steps_together(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> None:
    mine = [answer(steps=s, accepted=a, prompt=str(i)) for i, (s, a) in enumerate(ours)]
    others = [answer(steps=s, accepted=a, prompt=str(i)) for i, (s, a) in enumerate(theirs)]
    pairs = paired(mine, others)
    assert len(pairs) == min(len(ours), len(theirs))
    assert length(mine) == pytest.approx(1 + sum(a for _, a in ours) / sum(s for s, _ in ours))
    assert ratio(paired(mine, mine)) == pytest.approx(1.0)
    assert ratio_error(paired(mine, mine)) == pytest.approx(0.0, abs=1e-6)
    error = ratio_error(pairs)
    assert error is not None
    assert error >= 0


def test_nothing_is_said_of_nothing() -> None:
    assert length([]) is None
    assert speed([]) is None
    assert ratio([]) is None
    assert ratio_error([(answer(), answer())]) is None
    assert smoothed([answer(steps=0)]) == []


def test_acceptance_over_time_is_of_the_last_answers() -> None:
    answers = [answer(accepted=accepted, at=float(at)) for at, accepted in enumerate((0, 10, 20))]
    assert smoothed(answers, window=2) == smoothed(answers[::-1], window=2) == [(0.0, 1.0), (1.0, 1.5), (2.0, 2.5)]


def test_a_gain_is_over_the_first_side_on_the_same_prompts() -> None:
    answers = [answer("static", accepted=10, domain=domain) for domain in ("law", "code")]
    answers += [answer("alignment", accepted=14, seconds=0.5, domain=domain) for domain in ("law", "code")]
    answers += [answer("alignment", accepted=0, prompt="only mine")]
    answers += [answer("alignment", phase=STREAM, at=at) for at in (0.0, 59.0)]
    state = {"side": "alignment", "tenant": "law", "num_updates": 9, "num_published": 1, "num_refused": 0}
    told = record("gain", ["static", "alignment"], answers=answers, states=[state | {"num_rolled_back": 0}])
    rows = {(row["side"], row["domain"]): row for row in summary(told)}
    law = rows["alignment", "law"]
    assert (law["to_base"], law["speed_to_base"]) == pytest.approx((2.4 / 2.0, 2.0))
    assert (law["stream_tokens"], law["stream_minutes"]) == pytest.approx((40, 1.0))
    assert (law["updates"], law["published"], law["prompts"]) == (9, 1, 2)
    assert rows["static", "mean"]["to_base"] == pytest.approx(1.0)
    assert rows["alignment", "mean"]["to_base"] == pytest.approx(1.2)
    json.dumps(list(rows.values()), allow_nan=False)


def test_decoding_is_what_comes_after_the_first_token() -> None:
    """Where a prompt takes half of the slower side's time, twice the speed after it is 4/3 of the whole."""
    slow = [answer("a", prompt=str(n), seconds=2.0, first=1.0, tokens=21) for n in range(3)]
    fast = [answer("b", prompt=str(n), seconds=1.5, first=1.0, tokens=21) for n in range(3)]
    _, row = summary(record("gain", ["a", "b"], answers=slow + fast))
    assert row["decode_to_base"] == pytest.approx(2.0)
    assert row["speed_to_base"] == pytest.approx(4 / 3)
    assert row["first_seconds"] == 1.0


def test_what_is_lost_is_a_share_of_what_was_gained() -> None:
    assert lost_share(2.0, 2.4, 2.3) == pytest.approx(0.25)
    assert lost_share(2.0, 2.4, 2.5) == pytest.approx(-0.25)
    assert lost_share(2.0, 1.9, 1.8) is None
    answers = [answer("static", accepted=10), answer(accepted=14), answer(accepted=13, phase=RETURN)]
    rows = {row["side"]: row for row in summary(record("switch", ["static", "a"], answers=answers))}
    assert rows["a"]["lost"] == pytest.approx(0.25)
    assert rows["a"]["gained"] == pytest.approx(0.2)
    assert rows["static"]["lost"] is None


def test_memory_and_load_are_compared_with_the_first_side() -> None:
    runs: list[dict[str, Any]] = [{"side": "static", "engine_most": 900_000_000}]
    runs += [{"side": "a", "engine_most": 950_000_000, "worker_ready": 400_000_000, "worker_most": 550_000_000}]
    static, aligned = summary(record("memory", ["static", "a"], runs=runs))
    assert (aligned["engine_over_base"], aligned["worker_net"], aligned["sum"]) == pytest.approx((50, 150, 1500))
    assert static["sum"] == 900
    runs = [
        {"side": side, "round": number, "tokens_per_second": speed_, "itl_p50": 0.1, "itl_p99": 0.2, "updates": 3}
        | {"worker_cores": 0.1, "noise": 0.0}
        for number in range(2)
        for side, speed_ in (("static", 100.0 * (number + 1)), ("a", 90.0 * (number + 1)))
    ]
    _, aligned = summary(record("load", ["static", "a"], runs=runs))
    assert aligned["tokens_per_second_to_base"] == pytest.approx([0.9, 0.9])
    assert aligned["itl_p99_to_base"] == pytest.approx([1.0, 1.0])


@given(
    rounds=st.integers(1, 20), domains=st.lists(st.sampled_from(["law", "code", "medicine"]), min_size=1, unique=True)
)
def test_all_is_measured_whoever_the_servers_are(rounds: int, domains: list[str]) -> None:
    for part in PARTS:
        whole = Plan(
            part, "m", ["static"], VOCABULARIES, [], domains, 600.0, 0.0, 0.0, 1, None, 4, False, 8, DRAFTING, rounds, 8
        )
        found = stages(whole)
        assert sum(stage.seconds for stage in found) == pytest.approx(whole.seconds)
        if part == "gain":
            assert [domain for stage in found for domain in stage.domains] == domains
        else:
            assert {tuple(stage.domains) for stage in found} == {tuple(domains)}
        if part == "load":
            numbers = [stage.first_round + number for stage in found for number in range(stage.rounds)]
            assert numbers == list(range(rounds))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_cut_before_its_first_answer_has_a_table(part: str) -> None:
    cut = record(part, SIDES[part])
    cut["summary"] = summary(cut)
    assert table(cut).columns
