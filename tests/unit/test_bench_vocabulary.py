"""The pure parts of the vocabulary benchmarks: modes' names, order of requests, what runs come to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.common.drafting import NONE, Drafting
from benchmarks.common.in_process import Generation
from benchmarks.prompts.build import Prompt
from benchmarks.vocabulary import conversation, switch
from benchmarks.vocabulary.modes import FULL, HARD_SWITCH, NANOSPEC, make_mode
from benchmarks.vocabulary.sessions import counts
from benchmarks.vocabulary.switch import TOPICS, lengths, settled_after, shares
from evospec.engine.config import MAX_TAIL_TOKENS

DRAFTING = Drafting()
DOMAINS = ["code", "law", "medicine", "general"]
OURS = "dynamic:2048+1024"


def prompt(domain: Any, number: int) -> Prompt:
    name = f"{domain}{number}"
    return Prompt(name, domain, "eval", [{"role": "user", "content": name}], "", "", "")


PROMPTS = {domain: [prompt(domain, number) for number in range(40)] for domain in DOMAINS}


def test_a_mode_is_a_vocabulary_and_switches() -> None:
    mode = make_mode(f"{OURS}/prior=off,graph=false,prior_order=2,cold", "smollm2-135m", DRAFTING, 17)
    speculation = mode.config.speculation
    assert (speculation.vocabulary, speculation.num_speculative_tokens, speculation.adaptive) == (OURS, 4, False)
    assert (speculation.dynamic.prior, speculation.dynamic.graph, speculation.dynamic.prior_order) == ("off", False, 2)
    assert mode.cold
    assert not make_mode(OURS, "smollm2-135m", DRAFTING, 17).cold
    assert make_mode(NONE, "smollm2-135m", DRAFTING, 17).config.speculation.method == "none"


@pytest.mark.parametrize("name", ["statik:5", f"{OURS}/prior=maybe", f"{OURS}/colour=red", "dynamic:5"])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        make_mode(name, "smollm2-135m", DRAFTING, 17)


def test_others_methods_are_made_of_the_switches() -> None:
    fr_spec = make_mode("fr-spec:12288", "smollm2-135m", DRAFTING, 17).config.speculation
    assert (fr_spec.vocabulary, fr_spec.copies) == ("static:12288", False)
    nanospec = make_mode(NANOSPEC, "smollm2-135m", DRAFTING, 17)
    dynamic = nanospec.config.speculation.dynamic
    assert not nanospec.config.speculation.copies
    assert nanospec.config.speculation.vocabulary == f"dynamic:17+{MAX_TAIL_TOKENS}"
    assert 17 + MAX_TAIL_TOKENS < 3000
    assert (dynamic.in_context, dynamic.target_signal, dynamic.prior) == (True, "every", "off")
    assert not dynamic.graph
    assert not dynamic.semantic
    assert not dynamic.tenant_memory
    paper = make_mode("paper:12288", "smollm2-135m", DRAFTING, 17).config.speculation
    assert paper.vocabulary == "dynamic:12288+256"
    assert (paper.dynamic.target_signal, paper.dynamic.replacement, paper.dynamic.prior) == ("events", "arc", "off")
    assert paper.dynamic.semantic
    assert paper.dynamic.graph
    hard_switch = make_mode(HARD_SWITCH, "smollm2-135m", DRAFTING, 17)
    speculation = hard_switch.config.speculation
    assert (speculation.vocabulary, speculation.num_speculative_tokens, speculation.copies) == (FULL, 4, False)
    assert hard_switch.switches


def test_a_session_that_switches_goes_on_through_all_topics() -> None:
    asks = list(switch.asks(PROMPTS, 3))
    first = [(labels, ask) for labels, ask in asks if labels["session"] == 0]
    assert [labels["place"] for labels, _ in first] == list(range(9))
    assert [labels["topic"] for labels, _ in first[::3]] == list(TOPICS)
    assert {ask.session for _, ask in first} == {"session-0"}
    assert len({ask.tenant for _, ask in asks}) == 2
    assert len({ask.messages[0]["content"] for _, ask in asks}) == len(asks)


def test_a_conversation_is_one_session_and_asks_nothing_twice() -> None:
    asks = [ask for _, ask in conversation.asks(PROMPTS, 160)]
    assert {(ask.session, ask.goes_on) for ask in asks} == {("conversation", True)}
    questions = [ask.messages[0]["content"] for ask in asks]
    assert questions[9:11] == ["code9", "law0"]
    assert questions[40] == "code10"
    assert len(set(questions)) == 160


def test_only_drafts_of_the_whole_length_count() -> None:
    run = Generation([[1, 2]], verified=[(4, 4), (2, 2), (4, 0), (1, 0)])
    assert counts(run) == {"drafts": 2, "accepted": 4}


def of_switch(mode: str, place: int, accepted: int) -> dict[str, Any]:
    topic = "law" if place < 4 else "code"
    return {"mode": mode, "topic": topic, "place": place, "session": 0, "drafts": 100, "accepted": accepted}


def test_after_a_switch_values_are_shares_of_the_first_modes() -> None:
    runs = []
    for place in range(8):
        runs += [of_switch(FULL, place, 20), of_switch(OURS, place, 20 if place == 4 else 80)]
    found = lengths(runs, OURS)
    assert found[3] == pytest.approx(1.8)  # not smoothed with the next topic's
    assert found[4] == pytest.approx(1.6)
    assert shares(runs, OURS)[4] == pytest.approx(1.6 / 1.2)
    rows = list(zip(*(column.cells for column in switch.table(runs, "m").columns), strict=True))
    assert rows[1:4:2] == [(OURS, "law", "1.80", "1.50", "1.50", "0"), (OURS, "code", "1.65", "1.33", "1.50", "1")]


@given(st.lists(st.floats(0.1, 10.0), min_size=1))
def test_it_always_settles_at_a_request_that_is_near_enough(values: list[float]) -> None:
    place = settled_after(values)
    steady = sum(values[len(values) // 2 :]) / len(values[len(values) // 2 :])
    assert values[place] >= 0.95 * steady
    assert all(value < 0.95 * steady for value in values[:place])
