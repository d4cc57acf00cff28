"""Drafts copied from a sequence's own text, against a search of the whole text."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.messages import SamplingParams
from evospec.engine.optional_parts import OptionalParts
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.lookup import MIN_MATCH, NgramProposer, PromptLookup
from evospec.engine.speculation.length.policy import LengthPolicy
from evospec.engine.speculation.speculator import AcceptanceAlarm, Speculator
from evospec.engine.step import Batch, Copy, Decodes, DraftSlot, Proposal, ScheduledSequence, Step, Verification
from tests.reference.text_matches import TextMatches, copied

SAMPLING = SamplingParams(max_tokens=9, seed=0, temperature=0.0)
texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def expected_draft(text: list[int], count: int) -> list[int]:
    whole = TextMatches()
    whole.extend(text)
    place, length = whole.longest()
    return copied(text, place, count) if length >= MIN_MATCH else []


def propose(proposer: NgramProposer, request: Request, count: int) -> list[int]:
    proposals = proposer.propose([DraftSlot(request, count, array("i"))])
    return proposals[request].token_ids if request in proposals else []


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
    proposer.end(request)
    request.all_token_ids = [1, 2, 3, 5, 1, 2, 3]
    assert propose(proposer, request, 1) == [5]


class RecordingPolicy(LengthPolicy):
    """Keeps what it is told became of drafts and of copies."""

    def __init__(self) -> None:
        self.drafts, self.copies = list[Sequence[bool]](), list[Sequence[bool]]()

    def record_drafts(self, request: Request, proposal: Proposal, outcomes: Sequence[bool]) -> None:
        self.drafts.append(outcomes)

    def record_copy(self, request: Request, copy: Copy, outcomes: Sequence[bool]) -> None:
        self.copies.append(outcomes)


def take_step(speculator: Speculator, request: Request, new: int) -> Step:
    """Draft at most four tokens; the target goes on with ``new``."""
    (length,) = speculator.lengths(Decodes([request], [4], 0))
    proposal = speculator.propose([DraftSlot(request, length, array("i"))])[request]
    assert len(proposal.token_ids) == 4
    sequence = ScheduledSequence.of(request, 1 + len(proposal.token_ids), proposal)
    return Step(Batch([sequence], 5, 0, []), [Verification(sequence, 0, kept=[new])], torch.empty(0), None)


def test_drafts_and_what_could_be_copied_are_judged_by_what_came() -> None:
    texts, policy = RunningTexts(8), RecordingPolicy()
    speculator = Speculator(NgramProposer(texts), policy, 4, OptionalParts(), PromptLookup(texts))
    policy.learn(take_step(speculator, Request("r", b"", "t", SAMPLING, [1, 2, 3, 9, 1, 2, 3]), new=7))
    assert policy.drafts == policy.copies == [[False]]


def test_copies_that_are_wrong_are_no_sign_of_a_bad_draft() -> None:
    """There is none: nobody is told to look at its layers."""
    speculator = Speculator(NgramProposer(RunningTexts(8)), LengthPolicy(), 4, OptionalParts())
    alarm = AcceptanceAlarm()
    request = Request("r", b"", "t", SAMPLING, [1, 2, 3, 9, 1, 2, 3])
    with capture_logs() as logs:
        for new in range(100, 310):  # the target says something new, then what came before
            alarm.learn(take_step(speculator, request, new))
            request.all_token_ids += [new, 1, 2, 3]
    assert logs == []
