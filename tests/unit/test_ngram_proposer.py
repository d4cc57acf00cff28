"""Drafts copied from a sequence's own text, against a search of the whole text."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.lookup import MIN_MATCH, NgramProposer, PromptLookup
from evospec.engine.speculation.length.policy import Chain, Draftable, LengthPolicy
from evospec.engine.speculation.speculator import Speculator
from evospec.engine.step_plan import DraftSlot, ScheduledSequence
from evospec.engine.verification import Verification
from tests.reference.text_matches import TextMatches, copied

SAMPLING = SamplingParams(max_tokens=9, seed=0, temperature=0.0)
texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def expected_draft(text: list[int], count: int) -> list[int]:
    whole = TextMatches()
    whole.extend(text)
    place, length = whole.longest()
    return copied(text, place, count) if length >= MIN_MATCH else []


def propose(proposer: NgramProposer, request: Request, count: int) -> list[int]:
    request.draft_token_ids = []
    proposer.propose([DraftSlot(request, count, array("i"))])
    return request.draft_token_ids


@given(pieces=st.lists(texts, min_size=1, max_size=4), count=st.integers(1, 6))
def test_drafts_follow_the_longest_repeat(pieces: list[list[int]], count: int) -> None:
    """However the text grows between two drafts; another sequence's text does not count."""
    proposer = NgramProposer(RunningTexts(8))
    request, other = (Request(name, b"", "t", SAMPLING, pieces[0][:]) for name in ("one", "other"))
    for piece in [[], *pieces[1:]]:
        request.all_token_ids += piece
        assert propose(proposer, request, count) == expected_draft(request.all_token_ids, count)
        assert propose(proposer, other, count) == expected_draft(pieces[0], count)


def test_a_text_that_repeats_itself_is_drafted_beyond_its_end() -> None:
    request = Request("r", b"", "t", SAMPLING, [9, 1, 2, 1, 2, 1, 2])
    assert propose(NgramProposer(RunningTexts(8)), request, 5) == [1, 2, 1, 2, 1]


def test_no_draft_where_none_is_wanted_or_nothing_repeats() -> None:
    proposer, repeating = NgramProposer(RunningTexts(8)), Request("r", b"", "t", SAMPLING, [1, 2, 3, 4, 1, 2, 3])
    assert propose(proposer, repeating, 0) == []
    assert propose(proposer, repeating, 2) == [4, 1]
    assert propose(proposer, Request("s", b"", "t", SAMPLING, [1, 2, 3, 4, 1, 2]), 2) == []


def test_what_is_forgotten_is_read_anew() -> None:
    """A preempted request comes back."""
    proposer, request = NgramProposer(RunningTexts(8)), Request("r", b"", "t", SAMPLING, [1, 2, 3, 4, 1, 2, 3])
    assert propose(proposer, request, 1) == [4]
    proposer.forget(request)
    request.all_token_ids = [1, 2, 3, 5, 1, 2, 3]
    assert propose(proposer, request, 1) == [5]


class RecordingPolicy(LengthPolicy):
    """Keeps what it is told became of drafts and of copies."""

    def __init__(self) -> None:
        self.drafts, self.copies = list[Sequence[bool]](), list[Sequence[bool]]()

    def record_drafts(self, sequence: Draftable, chain: Chain, outcomes: Sequence[bool]) -> None:
        self.drafts.append(outcomes)

    def record_copy(self, sequence: Draftable, outcomes: Sequence[bool]) -> None:
        self.copies.append(outcomes)


@pytest.mark.parametrize("is_preempted", [False, True])
def test_drafts_of_a_preempted_request_are_not_judged_by_what_it_computes_when_it_is_back(is_preempted: bool) -> None:
    """What was drafted and what could be copied belonged to the step that it has lost."""
    texts, policy = RunningTexts(8), RecordingPolicy()
    speculator = Speculator(NgramProposer(texts), policy, 4, 1000, PromptLookup(texts))
    request = Request("r", b"", "t", SAMPLING, [1, 2, 3, 9, 1, 2, 3])
    lengths = speculator.draft_lengths([request], [4], 0)
    speculator.draft([DraftSlot(request, lengths[0], array("i"))])
    assert request.draft_token_ids == [9, 1, 2, 3]
    if is_preempted:
        request.draft_token_ids = []
        speculator.preempted(request)
    speculator._judge([Verification(ScheduledSequence.of(request, 1 + len(request.draft_token_ids)), 0, kept=[7])])
    assert policy.drafts == policy.copies == ([] if is_preempted else [[False]])


def test_copies_that_are_wrong_are_no_sign_of_a_bad_draft() -> None:
    """There is none: nobody is told to look at its layers."""
    speculator = Speculator(NgramProposer(RunningTexts(8)), LengthPolicy(), 4, 1000)
    request = Request("r", b"", "t", SAMPLING, [1, 2, 3, 9, 1, 2, 3])
    with capture_logs() as logs:
        for new in range(100, 310):  # the target says something new, then what came before
            speculator.draft([DraftSlot(request, 4, array("i"))])
            assert request.draft_token_ids
            step = ScheduledSequence.of(request, 1 + len(request.draft_token_ids))
            speculator._judge([Verification(step, 0, kept=[new])])
            request.draft_token_ids = []
            request.all_token_ids += [new, 1, 2, 3]
    assert logs == []
