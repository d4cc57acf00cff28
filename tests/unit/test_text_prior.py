"""What the worker adds to a draft's logits for the prior, against the engine's prior itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.chains import collate
from adapters.records import Segment
from engine.vocab.core_set import CoreSet
from engine.vocab.draft_prior import DraftPrior
from engine.vocab.ngrams import SessionNgrams
from engine.vocab.prior import NUM_FEATURES
from engine.vocab.prior_weights import PriorWeights
from engine.vocab.session_vocab import Owner, SessionVocab
from tests.drifting_traffic import DriftingTraffic, TinyDraft
from tests.unit.test_replay import segment

VOCAB = 12
HORIZON = 4
texts = st.lists(st.integers(0, VOCAB - 1), min_size=HORIZON + 1, max_size=60)
weights = st.lists(st.floats(0, 3, width=16), min_size=NUM_FEATURES, max_size=NUM_FEATURES)


def with_prior(text: list[int], of_prior: list[float]) -> Segment:
    """A segment whose chains begin at every position of its second half."""
    n = len(text)
    return dataclasses.replace(
        segment("r", n),
        token_ids=torch.tensor(text),
        anchors=torch.arange(n) >= n // 2,
        prior=torch.tensor([of_prior] * n, dtype=torch.float16),
    )


def as_served(text: list[int], of_prior: list[float], drafts: list[int]) -> torch.Tensor:
    """[VOCAB]: what the engine adds, a session having had a text, to what may follow its drafts."""
    session = SessionVocab(
        Owner("t", None), 0, CoreSet(VOCAB, None), None, SessionNgrams(VOCAB), PriorWeights(of_prior)
    )
    session.observe_prompt(text)
    prior = DraftPrior(learned=True, order=3, graph=None, matches=True)
    two_ago, one_ago = [-1, *text, *drafts][-2:]
    every = np.arange(VOCAB, dtype=np.int32)[None]
    scores, _ = prior.score([session], [(two_ago, one_ago)], [drafts], every, np.zeros((1, VOCAB), np.float32))
    return torch.from_numpy(scores[0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(texts, weights), min_size=1, max_size=3))
def test_a_chain_begins_with_the_prior_that_the_engine_applies(
    of_segments: list[tuple[list[int], list[float]]],
) -> None:
    batch = collate([with_prior(*each) for each in of_segments], HORIZON)
    bonus = batch.bonus(torch.arange(len(batch.starts)), 0, torch.arange(VOCAB))
    for start, found in zip(
        batch.starts.tolist(), torch.as_tensor(bonus).expand(len(batch.starts), VOCAB), strict=True
    ):
        text, of_prior = of_segments[start // batch.positions.shape[1]]
        end = start % batch.positions.shape[1] + 1
        torch.testing.assert_close(found, as_served(text[:end], of_prior, []), atol=2e-3, rtol=1e-3)


def test_later_steps_follow_the_text() -> None:
    """The engine looks up a draft's n-grams in the text before it; the worker has the right drafts in the text."""
    text, of_prior = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4], [0.5, 0.5, 1.0, 0.0, 1.5]
    batch = collate([with_prior(text, of_prior)], HORIZON)
    start = batch.starts.tolist().index(6)
    for step in range(HORIZON):
        found = torch.as_tensor(batch.bonus(torch.tensor([start]), step, torch.arange(VOCAB)))[0]
        expected = as_served(text[:7], of_prior, text[7 : 7 + step])
        assert found.argmax() == expected.argmax() == text[step + 1]
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)


def test_tokens_that_nobody_asks_for_are_left_out() -> None:
    batch = collate([with_prior([1, 2, 3, 1, 2, 3, 1], [1.0] * NUM_FEATURES)], HORIZON)
    chains, every = torch.arange(len(batch.starts)), torch.arange(VOCAB)
    some = torch.tensor([0, 2, 11])
    for step in range(HORIZON):
        assert torch.equal(batch.bonus(chains, step, every)[:, some], batch.bonus(chains, step, some))  # type: ignore[index]
    assert set(batch.wanted_ids.tolist()) >= {1, 2, 3}


def test_without_a_prior_nothing_is_added() -> None:
    batch = collate([with_prior([1, 2, 3, 1, 2, 3, 1], [0.0] * NUM_FEATURES)], HORIZON)
    assert batch.prior is None
    assert batch.bonus(torch.arange(len(batch.starts)), 0, torch.arange(VOCAB)) == 0.0


def test_chains_say_what_the_draft_says_with_the_prior(tmp_path: Path) -> None:
    tiny = TinyDraft.make(tmp_path)
    plain = next(iter(DriftingTraffic(tiny.chains).answers(1))).segment()
    repeated = plain.token_ids[torch.arange(len(plain.token_ids)) % 7]
    plain = dataclasses.replace(plain, token_ids=repeated)
    served = dataclasses.replace(plain, prior=torch.ones_like(plain.prior))
    batches = [collate([each], HORIZON) for each in (plain, served)]
    every = torch.arange(len(tiny.chains.target.head))
    for without, having in zip(*(tiny.chains.steps(batch, {}, every) for batch in batches), strict=True):
        bonus = batches[1].bonus(having.chains, having.number, every)
        assert (torch.as_tensor(bonus) > 0.5).any(dim=1).all()
        torch.testing.assert_close(having.logits, without.logits + bonus)
