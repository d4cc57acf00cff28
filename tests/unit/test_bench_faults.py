"""How ``benchmarks.faults`` judges answers and versions."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.faults.report import Seen
from benchmarks.faults.requests import Answer, Finished, Outcome, judge
from benchmarks.faults.watch import Versions

EXPECTED = Answer(("a", "b", "c"), "length", 0, None)
GONE = {"code": "engine_unavailable", "message": "The engine stopped while it worked on the request."}
STARTING = {"code": "engine_unavailable", "message": "The engine is starting or restarting. Try again soon."}


@pytest.mark.parametrize(
    ("tokens", "finish_reason", "error", "outcome"),
    [
        ("abc", "length", None, Outcome.RIGHT),
        ("abd", "length", None, Outcome.CHANGED),
        ("abcd", "length", None, Outcome.CHANGED),
        ("ab", "length", None, Outcome.FAILED),
        ("abc", None, None, Outcome.FAILED),
        ("ab", None, GONE, Outcome.CUT),
        ("", None, GONE, Outcome.CUT),
        ("ad", None, GONE, Outcome.CHANGED),
        ("", None, STARTING, Outcome.REFUSED),
        ("", None, {"code": "internal_error", "message": "?"}, Outcome.FAILED),
    ],
)
def test_only_the_whole_right_answer_is_right(
    tokens: str, finish_reason: str | None, error: dict[str, Any] | None, outcome: Outcome
) -> None:
    assert judge(Answer(tuple(tokens), finish_reason, 7, error), EXPECTED)[0] is outcome


def test_versions_that_go_back_are_seen() -> None:
    versions = Versions()
    for channel, engine in (
        ({"a": 1}, {}),
        ({"a": 1, "b": 3}, {"a": 1}),
        ({"b": 4}, {"b": 3}),
        ({}, {}),
        ({"a": 5}, {}),
    ):
        versions.observe_channel(channel)
        versions.observe_engine(engine)
    versions.observe_answer("a", 1, 1)
    versions.observe_answer("a", 0, 1)
    assert (versions.num_seen, versions.violations) == (4, [])
    versions.observe_channel({"a": 2})
    versions.observe_channel({"b": 5})
    versions.observe_engine({"b": 2})
    versions.observe_answer("a", 3, 4)
    assert len(versions.violations) == 4


@pytest.mark.parametrize("kills_engine", [False, True])
def test_a_request_cut_off_has_failed_unless_the_engine_was_killed(kills_engine: bool) -> None:
    seen = Seen("", kills_engine)
    seen.seconds += [1.0, 3.0]
    seen.take([Finished("a", outcome, 0, 0, "") for outcome in (Outcome.RIGHT, Outcome.CUT, Outcome.REFUSED)])
    row = seen.record()
    told = (row["failed"], row["cut"], row["refused"], row["holds"])
    assert told == ((0, 1, 1, True) if kills_engine else (2, 0, 0, False))
    assert (row["requests"], row["recovered"], row["longest_seconds"]) == (3, 2, 3.0)
