"""The vocabularies of running sequences: what enters them, who shares them, what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.vocabulary.replay import verification
from evospec.engine.config import DynamicConfig
from evospec.engine.draft_vocab.bigram_graph import build_bigram_graph
from evospec.engine.draft_vocab.resources import Resources, core_mask
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.draft_vocab.snapshot import decode
from evospec.engine.draft_vocab.step_ends import MAX_BEGUN, MAX_OF_PROMPT
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.messages import SamplingParams, SessionState
from evospec.engine.request import Request
from evospec.kernels.session_options import NUM_FEATURES

VOCAB, CORE, SLOTS, FINGERPRINT = 1000, 100, 64, "tokens"
EMPTY = -1


def _count(rows: Sequence[slice]) -> int:
    return sum(of_sequence.stop - of_sequence.start for of_sequence in rows)


class Slabs:
    """The tails' memory, as the draft head would read it."""

    slots, num_bytes = SLOTS, 0

    def __init__(self, num_slabs: int) -> None:
        self.token_ids = np.full((num_slabs, SLOTS), EMPTY)
        self.num_writes = 0

    def write(self, slab: Sequence[int], slots: Sequence[int], token_ids: Sequence[int]) -> None:
        self.num_writes += 1
        assert len(slab), "a write of nothing"
        assert len(set(zip(slab, slots, strict=True))) == len(slab), "which of two tokens a slot gets is left open"
        self.token_ids[list(slab), list(slots)] = token_ids
        for row in self.token_ids:
            used = row[row != EMPTY]
            assert len(set(used.tolist())) == len(used), "a token is in a slab twice"
            assert (used >= CORE).all(), "a token of the core is in a slab"

    def clear(self, slab: int) -> None:
        self.token_ids[slab] = EMPTY


class Harness:
    """Vocabularies, and sequences whose steps a test plays by hand."""

    def __init__(self, start_weights: Sequence[float] | None = None, **options: object) -> None:
        self.options = DynamicConfig(**({"max_sessions": 3} | options))
        self.slabs = Slabs(self.options.max_sessions + 1)
        text = np.tile(np.arange(200, 300, dtype=np.int32), 9)
        graph = build_bigram_graph([text], VOCAB)
        core = core_mask(VOCAB, np.arange(CORE))
        resources = Resources(core, FINGERPRINT, self.slabs, graph, start_weights=start_weights)
        self.vocab = DraftVocab(self.options, resources, RunningTexts(8))
        self.top: NDArray[np.int32] = np.arange(10, dtype=np.int32)
        """What the target thinks likely at every position."""
        self.later: list[str] = []
        """New sequences that get no vocabulary before they are drafted for."""
        self.vocab.begins_later = lambda request: request.request_id in self.later

    def start(
        self,
        name: str,
        prompt: Sequence[int],
        tenant: str = "t",
        state: SessionState | None = None,
        first: int = 1,
        temperature: float = 0.0,
    ) -> Request:
        """A request whose prompt has been computed, and its first token."""
        sampling = SamplingParams(max_tokens=99, seed=0, temperature=temperature)
        domain = (state.domain or None) if state else None
        request = Request(name, b"", tenant, sampling, list(prompt), domain=domain)
        request.session = state
        self.verify(request, [first])
        return request

    def verify(self, request: Request, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        """A step that keeps ``tokens``."""
        self.vocab.follow([verification(request, tokens, drafts)], self.most_likely)
        request.output_token_ids += tokens
        request.all_token_ids += tokens

    def most_likely(self, rows: Sequence[int]) -> NDArray[np.int32]:
        """The target's choices at each of some rows."""
        return np.tile(self.top, (len(rows), 1))

    def tail(self, request: Request) -> set[int]:
        """What is in the request's slab when it drafts."""
        (slab,) = self.slabs_of(request)
        return set(self.slabs.token_ids[slab].tolist()) - {EMPTY}

    def slabs_of(self, *requests: Request) -> list[int]:
        """The tails of requests that draft now."""
        self.vocab.before_drafts(requests)
        return self.vocab.slabs(requests)

    def with_prior(
        self, requests: Sequence[Request], ids: NDArray[np.int32], logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The scores of candidates for the first drafts of requests; what repeats is no candidate."""
        self.vocab.before_drafts(requests)
        scores = logits.copy()
        known = torch.from_numpy(ids.copy()), torch.from_numpy(scores)
        self.vocab.choose_with_prior(
            requests, [[] for _ in requests], *known, lambda rows, _: torch.full((len(rows),), -9.0)
        )
        return scores

    def end(self, request: Request) -> bytes | None:
        snapshot, _ = self.vocab.leave(request)
        self.vocab.end(request)
        return snapshot


def test_prompt_answer_and_the_targets_choices_enter_the_tail() -> None:
    harness = Harness(graph=False)
    request = harness.start("a", [5, 700, 6, 701])
    assert harness.tail(request) == {700, 701}
    harness.top = np.array([7, 800, 801], np.int32)
    harness.verify(request, [702, 8], drafts=[3])
    assert harness.tail(request) == {700, 701, 702, 800, 801}


def test_a_step_writes_all_tails_once_and_they_hold_what_vocabularies_do() -> None:
    harness, generator = Harness(graph=False, target_signal="every"), np.random.default_rng(0)
    running: list[Request] = []
    for number in range(120):
        tokens = generator.integers(1, VOCAB, 60).tolist()
        if len(running) == harness.options.max_sessions:
            harness.end(running.pop(int(generator.integers(len(running)))))
        running.append(harness.start(str(number), tokens))
        harness.slabs.num_writes = 0
        harness.vocab.before_drafts(running)
        assert harness.slabs.num_writes == 1
        for request in running:
            assert harness.tail(request) == set(harness.vocab.sessions.tail(*harness.vocab.slots([request])))
            harness.verify(request, generator.integers(1, VOCAB, 3).tolist(), drafts=[3])


def test_events_bring_what_follows_by_the_graph() -> None:
    harness = Harness(target_signal="events")
    request = harness.start("a", [5])
    harness.verify(request, [9], drafts=[9])
    assert harness.tail(request) == set()
    harness.verify(request, [250, 9], drafts=[3])
    assert {250, 251} <= harness.tail(request)
    counts = harness.vocab.leave(request)[1]
    assert counts is not None
    assert (counts.events, counts.verified_tokens, counts.covered_tokens) == (1, 4, 3)
    assert counts.insertions["context"] == counts.insertions["graph"] == 1


def test_hits_go_to_the_source_that_named_the_token_first() -> None:
    harness = Harness(graph=False, target_signal="every")
    harness.top = np.array([800, 801], np.int32)
    request = harness.start("a", [700])
    harness.verify(request, [700, 800, 3], drafts=[700, 800, 4])
    harness.verify(request, [801], drafts=[5])
    counts = harness.vocab.leave(request)[1]
    assert counts is not None
    assert counts.hits == {"context": 1, "target": 1}


def test_sequences_without_drafts_catch_up_when_they_draft_or_end() -> None:
    harness = Harness(graph=False)
    request = harness.start("a", [5], state=SessionState())
    for token in (700, 701, 702):
        harness.verify(request, [token])
    assert not (harness.slabs.token_ids == 700).any()
    assert {700, 701, 702} <= harness.tail(request)
    harness.verify(request, [703])
    snapshot = harness.end(request)
    assert snapshot is not None
    past = decode(snapshot, FINGERPRINT, VOCAB)
    assert {700, 701, 702, 703} == set(past.tail_token_ids())
    assert past.num_verified_tokens == 5


def test_a_sequence_that_catches_up_keeps_its_latest_tokens() -> None:
    """All, while there is room; steps that nobody followed say nothing about what could have been drafted."""
    harness = Harness(graph=False)
    request = harness.start("a", [5])
    for token in range(300, 300 + 3 * SLOTS):
        harness.verify(request, [token])
    assert harness.tail(request) == set(range(300 + 2 * SLOTS, 300 + 3 * SLOTS))
    counts = harness.vocab.leave(request)[1]
    assert counts is not None
    assert (counts.verified_tokens, counts.events) == (1, 0)  # that of the prefill


def test_a_session_that_learned_nothing_leaves_its_tenants_weights_alone() -> None:
    """Such as one that brings old weights, and was never drafted for."""
    harness = Harness()
    old = harness.end(harness.start("old", [5], state=SessionState()))
    teach(harness, "t", 700)
    memory = harness.vocab._past._memory
    assert memory is not None
    learned = memory.weights("t", None)
    harness.end(harness.start("again", [5], state=SessionState(snapshot=old or b"")))
    assert learned is not None
    assert memory.weights("t", None) == learned


def test_where_nothing_is_drafted_a_vocabulary_is_made_when_it_is_wanted() -> None:
    harness = Harness(graph=False)
    harness.later = ["a", "b", "c"]
    drafted = harness.start("a", [5, 700, 6])
    silent = harness.start("b", [5, 800], state=SessionState())
    ephemeral = harness.start("c", [5, 900])
    harness.verify(drafted, [701])
    assert harness.vocab.num_used == 0
    assert harness.tail(drafted) == {700, 701}
    assert harness.vocab.num_used == 1
    assert harness.end(ephemeral) is None
    snapshot = harness.end(silent)
    assert snapshot is not None
    assert 800 in harness.tail(harness.start("d", [5], state=SessionState(snapshot=snapshot)))


def test_no_more_vocabularies_than_configured() -> None:
    harness = Harness(max_sessions=2)
    requests = [harness.start(name, [600 + index]) for index, name in enumerate("abc")]
    assert harness.slabs_of(*requests) == [0, 1, 2]
    assert harness.tail(requests[2]) == set()
    assert harness.vocab.leave(requests[2]) == (None, None)
    harness.end(requests[0])
    assert (harness.slabs.token_ids[0] == EMPTY).all()
    harness.verify(requests[2], [9], drafts=[1])  # the room that is free now is taken in mid-sequence
    assert harness.tail(requests[2]) == {602}


def test_a_session_goes_on_where_it_ended() -> None:
    harness = Harness(tenant_memory=False)
    prompt = [5, 700, 6, 701, 7, 8]
    first = harness.start("a", prompt, state=SessionState())
    harness.verify(first, [702], drafts=[3])
    snapshot = harness.end(first)
    assert snapshot is not None
    again = [*first.all_token_ids, 9, 703]
    second = harness.start("b", again, state=SessionState(snapshot=snapshot))
    assert {700, 701, 702, 703} <= harness.tail(second)
    later = harness.end(second)
    assert later is not None
    before, after = (decode(data, FINGERPRINT, VOCAB) for data in (snapshot, later))
    # Earlier turns that are sent again are not counted again: two new tokens, and one generated.
    assert after.num_observed_tokens == before.num_observed_tokens + 3
    assert after.num_verified_tokens == before.num_verified_tokens + 1


@pytest.mark.parametrize("data", [b"x", b"\x98" + b"\x00" * 90])
def test_a_damaged_snapshot_is_counted_and_the_session_starts_cold(data: bytes) -> None:
    harness = Harness()
    request = harness.start("a", [700], state=SessionState(snapshot=data))
    assert harness.tail(request) == {700}
    assert harness.vocab.num_refused_snapshots == 1


def test_a_session_keeps_few_of_the_choices_that_end_in_one_step() -> None:
    harness = Harness(max_sessions=8)
    choices = [harness.start(str(number), [5, 700], state=SessionState(domain="d")) for number in range(6)]
    other = harness.start("other", [5, 701], state=SessionState(domain="d"))
    ends = [harness.vocab.leave(request) for request in [*choices, other]]
    assert [snapshot is not None for snapshot, _ in ends] == [True] * MAX_OF_PROMPT + [False] * 2 + [True]
    assert all(counts is not None for _, counts in ends)
    for request in [*choices, other]:
        harness.vocab.end(request)
    for number in range(MAX_OF_PROMPT + 2):
        request = harness.start(str(number), [5, 700], state=SessionState(domain="d"))  # which takes a step
        assert harness.end(request) is not None


def test_few_texts_of_a_tenant_are_read_only_when_they_end_in_one_step() -> None:
    harness = Harness(max_sessions=1)
    tenants = ["many"] * (MAX_BEGUN + 3) + ["few"] * 2
    harness.later = [str(number) for number in range(len(tenants))]
    requests = [
        harness.start(name, [5, 700 + int(name)], tenant, SessionState())
        for name, tenant in zip(harness.later, tenants, strict=True)
    ]
    are_kept = [harness.end(request) is not None for request in requests]
    assert are_kept == [True] * MAX_BEGUN + [False] * 3 + [True] * 2


def test_choices_with_the_same_past_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(max_sessions=8)
    past = harness.end(harness.start("first", [5, 700], state=SessionState()))
    assert past is not None
    decoder = Mock(side_effect=decode)
    monkeypatch.setattr("evospec.engine.draft_vocab.past.decode", decoder)
    states = [SessionState(snapshot=bytes([*past])) for _ in range(3)]
    choices = [harness.start(str(number), [5, 6], state=state) for number, state in enumerate(states)]
    assert decoder.call_count == 1
    assert all(harness.tail(request) == {700} for request in choices)


def teach(harness: Harness, tenant: str, token: int, domain: str = "") -> None:
    """A request that generates one token often, and finds that the prior pays."""
    request = harness.start(f"{tenant} {token}", [3, 4, 3, 4], tenant, SessionState(domain=domain))
    ids, logits = np.array([[9, token]], np.int32), np.array([[1.0, 0.0]], np.float32)
    for _ in range(40):
        harness.with_prior([request], ids, logits)
        harness.verify(request, [token], drafts=[9])
    harness.end(request)


def test_a_new_session_starts_from_its_tenants_last_ones() -> None:
    harness = Harness()
    teach(harness, "one", 700)
    request = harness.start("new", [5], "one")
    assert 700 in harness.tail(request)
    ids, logits = np.array([[9, 700]], np.int32), np.array([[1.0, 0.0]], np.float32)
    harness.verify(request, [700], drafts=[9])
    assert harness.slabs_of(request) == [0]
    with_prior = harness.with_prior([request], ids, logits)
    assert with_prior[0, 1] > logits[0, 1]


@pytest.mark.parametrize("tenant_memory", [True, False])
def test_a_tenants_first_session_starts_with_the_weights_that_suit_the_draft(tenant_memory: bool) -> None:
    start = [0.5, 0.25, 1.0, 0.0, 2.0]
    harness = Harness(start, tenant_memory=tenant_memory)
    snapshot = harness.end(harness.start("first", [5, 6], state=SessionState()))
    assert snapshot is not None
    assert decode(snapshot, FINGERPRINT, VOCAB).weights == start


def test_tenants_share_nothing() -> None:
    """Not a token, not a weight, not a bigram: what one has taught does not change what another starts with."""
    taught, untaught = Harness(), Harness()
    for token in (700, 701):
        teach(taught, "one", token)
    requests = [harness.start("new", [5, 6], "two", SessionState()) for harness in (taught, untaught)]
    for harness, request in zip((taught, untaught), requests, strict=True):
        harness.verify(request, [701, 5], drafts=[9])
    assert taught.tail(requests[0]) == untaught.tail(requests[1])
    ends = [harness.end(request) for harness, request in zip((taught, untaught), requests, strict=True)]
    assert ends[0] == ends[1]
    assert ends[0] is not None
    assert decode(ends[0], FINGERPRINT, VOCAB).weights == [0.0] * NUM_FEATURES


def test_prior_learns_what_followed_and_leaves_other_rows_alone() -> None:
    harness = Harness(max_sessions=1)
    known, other = harness.start("a", [7, 8, 9]), harness.start("b", [7, 8, 9])
    ids, logits = np.array([[50, 60], [50, 60]], np.int32), np.array([[0.5, 0.0], [0.5, 0.0]], np.float32)
    for _ in range(30):
        scores = harness.with_prior([known, other], ids, logits)
        assert scores[1].tolist() == logits[1].tolist()
        harness.verify(known, [60], drafts=[int(ids[0, scores[0].argmax()])])
    assert scores[0, 1] > scores[0, 0]


def test_what_was_drafted_in_an_earlier_step_teaches_nothing() -> None:
    harness = Harness()
    request = harness.start("a", [7, 8, 9])
    harness.with_prior([request], np.array([[50, 60]], np.int32), np.array([[0.5, 0.0]], np.float32))
    harness.vocab.before_drafts([])  # of another step
    harness.verify(request, [60], drafts=[60])
    assert harness.vocab.sessions.counts(*harness.vocab.slots([request])).num_lessons == 0


def test_switches_switch_off() -> None:
    harness = Harness(in_context=False, target_signal="off", graph=False, tenant_memory=False, prior="off")
    request = harness.start("a", [700])
    harness.top = np.array([800], np.int32)
    harness.verify(request, [701], drafts=[3])
    assert harness.tail(request) == set()
    assert not harness.vocab.uses_prior
    assert harness.vocab.prior_weights([request]) is None
