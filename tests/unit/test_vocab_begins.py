"""Many sequences that begin in one step: their vocabularies are made a few at a time, so that no step takes long."""

from __future__ import annotations

from benchmarks.vocabulary.replay import verification
from evospec.engine.draft_vocab.vocab import MOST_BEGUN
from evospec.engine.messages import SamplingParams, SessionState
from evospec.engine.request import Request
from tests.unit.test_draft_vocab import Harness


def test_vocabularies_of_sequences_that_begin_together_are_made_in_several_steps() -> None:
    harness = Harness(max_sessions=3 * MOST_BEGUN)
    past = harness.end(harness.start("first", [5, 700], state=SessionState()))
    assert past is not None
    requests = [Request(str(n), b"", "t", SamplingParams(max_tokens=9, seed=0), [5, 6]) for n in range(3 * MOST_BEGUN)]
    for request in requests:
        request.session = SessionState(snapshot=past)
    harness.vocab.follow([verification(request, [1], []) for request in requests], lambda _: harness.top[None])
    assert harness.vocab.num_used == MOST_BEGUN
    for request in requests:
        request.output_token_ids.append(1)
        request.all_token_ids.append(1)
    for step in (2, 3, 3):
        slabs = harness.slabs_of(*requests)
        assert harness.vocab.num_used == step * MOST_BEGUN == sum(slab != len(requests) for slab in slabs)
    assert all(harness.tail(request) == {700} for request in requests)
