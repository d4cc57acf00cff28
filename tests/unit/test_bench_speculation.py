"""The pure parts of the speculation benchmarks: bounds, counts and sums."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.acceptance import Acceptance, total
from benchmarks.common.drafting import Drafting
from benchmarks.common.in_process import Generation, answer_lengths, take_turns
from benchmarks.common.runs import ALL
from benchmarks.common.time_limit import bounded
from benchmarks.equality import compare
from benchmarks.prompts.build import Prompt
from benchmarks.speculation.plan import REQUESTS_ALONE, Plan, chosen_prompts
from benchmarks.speculation.sides import acceptance_of, launch, samples
from benchmarks.speculation.summary import summaries, summary, worst
from server.settings import load_settings

DRAFTING = Drafting("eagle3", None, 4, adaptive=True)
PROMPTS = [Prompt(str(i), "code", "eval", [], "", "", "") for i in range(7)]


class Clock:
    """Moves only when an item is worked on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0.01, 10)), st.floats(0, 50))
def test_nothing_begins_that_would_end_late(durations: list[float], seconds: float) -> None:
    clock = Clock()
    done: list[float] = []
    for duration in bounded(durations, seconds, clock):
        assert clock.now - 100 + max(done, default=0.0) <= seconds
        done.append(duration)
        clock.now += duration
    if len(done) < len(durations):
        assert clock.now - 100 + max(done) > seconds
    if done and max(done) == done[0]:
        assert clock.now - 100 <= max(seconds, done[0]) + 1e-9


def test_rounds_follow_each_other_and_go_on_in_the_prompts() -> None:
    plan = Plan("speed", ["m"], ["none"], ["code", "law"], [1, 4], 2, 0, 8, True, 60, DRAFTING, http=False)
    cells = list(plan.cells())
    assert cells[:4] == [(0, 1, "code"), (0, 1, "law"), (0, 4, "code"), (0, 4, "law")]
    assert [number for number, _, _ in cells] == [0] * 4 + [1] * 4
    assert len(chosen_prompts(PROMPTS, 1, 0)) == REQUESTS_ALONE
    assert [p.id for p in chosen_prompts(PROMPTS, 2, 0)] == ["0", "1", "2", "3"]
    assert [p.id for p in chosen_prompts(PROMPTS, 2, 1)] == ["4", "5", "6", "0"]


@given(st.integers(1, 200), st.integers(2, 200))
def test_answers_end_one_by_one(count: int, mean: int) -> None:
    lengths = answer_lengths(count, mean)
    assert len(lengths) == count
    assert min(lengths) >= max(mean // 2, 1)
    assert max(lengths) <= mean + (mean + 1) // 2
    assert len(set(answer_lengths(64, 64))) == 64


@given(st.lists(st.lists(st.floats(0.01, 10.0), max_size=20), min_size=1, max_size=4))
def test_engines_take_turns_so_that_all_have_had_the_same_time(durations: list[list[float]]) -> None:
    results = [Generation([]) for _ in durations]
    left = [sum(steps) for steps in durations]

    def steps(place: int) -> Iterator[Generation]:
        yield results[place]
        for seconds in durations[place]:
            results[place].seconds += seconds
            left[place] -= seconds
            unfinished = [result.seconds for result, rest in zip(results, left, strict=True) if rest > 1e-6]
            assert not unfinished or results[place].seconds - min(unfinished) <= 10.001
            yield results[place]

    assert take_turns([steps(place) for place in range(len(durations))]) == results
    assert [result.seconds for result in results] == pytest.approx([sum(steps) for steps in durations])


def test_acceptance_by_place() -> None:
    counts = Acceptance()
    for drafted, accepted in ((4, 4), (4, 1), (2, 0), (0, 0)):
        counts.add(drafted, accepted)
    assert (counts.drafted, counts.accepted) == ([3, 3, 2, 2], [2, 1, 1, 1])
    assert counts.num_drafts == 3
    assert counts.length == pytest.approx(1 + 5 / 3)
    assert counts.rates == pytest.approx([2 / 3, 1 / 3, 1 / 2, 1 / 2])
    assert math.isnan(Acceptance().length)


@given(st.lists(st.integers(0, 8).flatmap(lambda drafted: st.tuples(st.just(drafted), st.integers(0, drafted)))))
def test_the_total_of_parts_is_the_count_of_all(drafts: list[tuple[int, int]]) -> None:
    whole, parts = Acceptance(), [Acceptance() for _ in drafts]
    for part, draft in zip(parts, drafts, strict=True):
        whole.add(*draft)
        part.add(*draft)
    assert total(parts) == whole
    assert sum(whole.accepted) == sum(accepted for _, accepted in drafts)


def run(mode: str, domain: str, number: int, seconds: float, accepted: int = 0, noise: float = 0.0) -> dict[str, Any]:
    """100 tokens; a draft of one token for every accepted one and one refused."""
    return {
        "model": "m",
        "mode": mode,
        "domain": domain,
        "concurrency": 1,
        "round": number,
        "tokens": 100,
        "seconds": seconds,
        "decode_tokens_per_second": 200 / seconds,
        "acceptance": {"drafted": [accepted + 1], "accepted": [accepted]}
        if accepted
        else {"drafted": [], "accepted": []},
        "step_seconds": {"draft": 0.1 * accepted, "verify": 1.0, "sample": 0.5, "overhead": 0.5},
        "noise": noise,
    }


def record(*runs: dict[str, Any]) -> dict[str, Any]:
    plan = {"models": ["m"], "modes": ["none", "full"], "domains": ["code", "law"], "levels": [1]}
    return {"plan": plan, "runs": list(runs)}


def test_a_cell_is_the_median_of_ratios_within_rounds() -> None:
    runs = []
    for number, (none, full) in enumerate([(1.0, 0.5), (2.0, 0.5), (3.0, 6.0)]):
        runs += [run("none", "code", number, none), run("full", "code", number, full, accepted=20, noise=number)]
    cell = summary(record(*runs), "m", "full", "code", 1)
    assert cell is not None
    assert (cell["ratio"], cell["ratios"], cell["decode_ratio"]) == (2.0, [2.0, 4.0, 0.5], 2.0)
    assert cell["tokens_per_second"] == 200.0
    assert cell["acceptance_length"] == pytest.approx(1 + 60 / 63)
    assert cell["drafts_a_step"] == pytest.approx(63 / (300 - 60))
    assert cell["shares"] == pytest.approx({"draft": 0.5, "verify": 0.25, "sample": 0.125, "overhead": 0.125})
    assert cell["noise"] == 2
    json.dumps(cell, allow_nan=False)


def test_all_domains_count_only_in_rounds_that_have_them_all() -> None:
    full = [run("full", "code", 0, 1.0, 1), run("full", "law", 0, 3.0, 1), run("full", "code", 1, 0.1, 1)]
    none = [run("none", "code", 0, 2.0), run("none", "law", 0, 6.0), run("none", "code", 1, 0.1)]
    cut = record(*full, *none)
    cell = summary(cut, "m", "full", ALL, 1)
    assert cell is not None
    assert (cell["rounds"], cell["tokens_per_second"], cell["ratio"]) == (1, 50.0, 2.0)
    assert {(c["mode"], c["domain"]) for c in summaries(cut)} == {
        (mode, domain) for mode in ("none", "full") for domain in ("code", "law", ALL)
    }
    least = worst(cut, ["code", "law"])
    assert least is not None
    assert (least["domain"], least["ratio"]) == ("code", 1.5)


def test_a_record_that_was_cut_short_has_fewer_cells() -> None:
    assert summaries(record(run("none", "code", 0, 1.0), run("full", "code", 0, 1.0))) != []
    assert summary(record(run("none", "code", 0, 1.0)), "m", "full", "code", 1) is None
    # A round whose last modes are missing has no ratio.
    assert summary(record(run("full", "code", 0, 1.0)), "m", "full", "code", 1) is None
    assert worst(record(), {ALL}) is None


METRICS = """
# TYPE evospec:spec_decode_num_draft_tokens_per_pos counter
evospec:spec_decode_num_draft_tokens_per_pos_total{tenant="a",position="0"} 5.0
evospec:spec_decode_num_draft_tokens_per_pos_total{tenant="b",position="0"} 3.0
evospec:spec_decode_num_draft_tokens_per_pos_total{tenant="a",position="1"} 4.0
evospec:spec_decode_num_draft_tokens_per_pos_total{tenant="a",position="2"} 0.0
# TYPE evospec:spec_decode_num_accepted_tokens_per_pos counter
evospec:spec_decode_num_accepted_tokens_per_pos_total{tenant="a",position="0"} 4.0
evospec:spec_decode_num_accepted_tokens_per_pos_total{tenant="b",position="0"} 2.0
evospec:spec_decode_num_accepted_tokens_per_pos_total{tenant="a",position="1"} 1.0
evospec:spec_decode_num_accepted_tokens_per_pos_total{tenant="a",position="2"} 0.0
# TYPE evospec:engine_step_seconds histogram
evospec:engine_step_seconds_sum{part="draft"} 1.5
"""


def test_a_server_tells_of_its_drafts_by_position() -> None:
    values = samples(METRICS)
    assert values["evospec:engine_step_seconds_sum", "draft"] == 1.5
    assert acceptance_of(values) == Acceptance([8, 4], [6, 1])


@pytest.mark.parametrize("mode", ["none", "full", "static:2048", "static:2048/copies=false"])
@pytest.mark.parametrize("drafting", [DRAFTING, Drafting("draft_model", "small", 2, adaptive=False)])
def test_a_server_gets_the_options_of_the_engine(drafting: Drafting, mode: str) -> None:
    config = drafting.config("m", mode)
    assert (config.speculation.method == "none") == (mode == "none")
    assert config.speculation.copies == ("copies" not in mode)
    settings = load_settings(launch(config, 1234).command[2:])
    assert settings.http.port == 1234
    for section in ("model", "cache", "scheduler", "speculation"):
        assert getattr(settings.engine, section) == getattr(config, section)


def test_equal_answers() -> None:
    answers = [[1, 2, 3], [4, 5], [6]]
    assert compare("a", answers, "b", answers).equal == 3
    result = compare("a", answers, "b", [[1, 2, 4], [4, 5, 6], [6]])
    assert (result.prompts, result.equal, result.first_difference) == (3, 1, 2)
