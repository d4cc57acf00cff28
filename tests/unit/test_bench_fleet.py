"""How ``benchmarks.fleet`` judges and counts."""

from __future__ import annotations

import pytest

from benchmarks.fleet.conversations import TURNS, Finished, Outcome, judge, make_conversations
from benchmarks.fleet.report import acceptance, phase_record
from evospec.server.bench.stream import Speculation, StreamResult


def result(text: str = "yes", error: str | None = None) -> StreamResult:
    return StreamResult(start=1.0, end=2.0, token_times=[1.5, 1.75], text_parts=[text], error=error)


@pytest.mark.parametrize(
    ("one", "outcome"),
    [
        (result(), Outcome.RIGHT),
        (result("no"), Outcome.WRONG),
        (result(error="HTTP 503: no healthy upstream"), Outcome.FAILED),
        (result(error="cannot connect: refused"), Outcome.FAILED),
        (result(error="connection closed before the stream ended"), Outcome.CUT),
        (result(error="error in the stream: {}"), Outcome.CUT),
    ],
)
def test_what_failed_is_told_from_what_was_cut(one: StreamResult, outcome: Outcome) -> None:
    assert judge(one, "yes") is outcome


def test_a_phase_counts_what_ended_in_it() -> None:
    finished = [
        Finished(Outcome.RIGHT, result()),
        Finished(Outcome.WRONG, result("no"), is_lost=True, is_saved=False),
        Finished(Outcome.CUT, result(error="connection lost: reset")),
    ]
    record = phase_record(finished, 10.0)
    assert (record["requests"], record["right"], record["wrong"], record["cut"], record["failed"]) == (3, 1, 1, 1, 0)
    assert (record["sessions_lost"], record["turns_not_saved"]) == (1, 1)
    assert (record["ttft"]["p99"], record["itl"]["p50"]) == (0.5, 0.25)
    assert record["errors"] == {"connection lost: reset": 1}


def test_acceptance_is_of_all_steps_together() -> None:
    results = [result(), result(), result()]
    results[0].speculation = Speculation(num_spec_steps=2, num_accepted_draft_tokens=6)
    results[1].speculation = Speculation(num_spec_steps=2, num_accepted_draft_tokens=0)
    assert acceptance(results) == 2.5


def test_each_turn_has_the_answers_before_it() -> None:
    first, second = make_conversations(2)
    assert first.name != second.name
    assert [first.body([])["temperature"], second.body([])["temperature"]] == [0.0, 0.7]
    messages = first.body(["a", "b"])["messages"]
    assert [m["content"] for m in messages if m["role"] == "assistant"] == ["a", "b"]
    assert messages[-1]["role"] == "user"
    assert len(first.body(["answer"] * (TURNS - 1))["messages"]) == 2 * TURNS - 1
