"""What the benchmarks share: bounds of time, engines that take turns, acceptance lengths and how sure they are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.acceptance import Run, estimate, length, mean, paired, ratio
from benchmarks.common.in_process import Generation, take_turns
from benchmarks.equality import compare
from benchmarks.step_share import bounded


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


def run(mode: str, number: int, drafts: int, accepted: int, name: str = "law") -> dict[str, Any]:
    return {"mode": mode, "set": name, "number": number, "drafts": drafts, "accepted": accepted}


def test_the_standard_error_is_what_a_figure_varies_by() -> None:
    """Of requests drawn again and again: the jackknife from one drawing tells how the ratios of all are spread."""
    rng = random.Random(0)

    def draw() -> list[tuple[Run, Run]]:
        drafts = [rng.randint(10, 40) for _ in range(60)]
        theirs = [run("full", place, n, sum(rng.random() < 0.5 for _ in range(n))) for place, n in enumerate(drafts)]
        return [(one | {"accepted": one["accepted"] + rng.randint(0, 4)}, one) for one in theirs]

    found = [one for one in (estimate(draw(), ratio) for _ in range(200)) if one is not None]
    middle = sum(one.value for one in found) / len(found)
    spread = math.sqrt(sum((one.value - middle) ** 2 for one in found) / len(found))
    assert found[0].error == pytest.approx(spread, rel=0.3)
    assert mean(found).error == pytest.approx(spread / math.sqrt(200), rel=0.1)


def test_only_requests_that_both_modes_answered_are_compared() -> None:
    ours = [run("ours", number, 10, accepted) for number, accepted in ((0, 10), (1, 10), (2, 0))]
    theirs = [run("full", number, 10, accepted) for number, accepted in ((0, 5), (1, 5), (3, 9))]
    pairs = paired(ours, theirs)
    assert [(one["number"], other["number"]) for one, other in pairs] == [(0, 0), (1, 1)]
    found = estimate(pairs, ratio)
    assert found is not None
    assert (found.value, found.error) == pytest.approx((2.0 / 1.5, 0.0))
    assert estimate(pairs[:1], ratio) is None
    assert math.isnan(length([run("ours", 0, 0, 0)]))


def test_equal_answers() -> None:
    answers = [[1, 2, 3], [4, 5], [6]]
    assert compare("a", answers, "b", answers).equal == 3
    result = compare("a", answers, "b", [[1, 2, 4], [4, 5, 6], [6]])
    assert (result.prompts, result.equal, result.first_difference) == (3, 1, 2)
