"""The compiled prior against plain numpy: features, scores, gradients, and who was right first."""

from __future__ import annotations

import numpy as np
import pytest
from engine.vocab.core_set import CoreSet
from engine.vocab.draft_prior import DraftPrior
from engine.vocab.ngrams import NgramSizes, SessionNgrams
from engine.vocab.prior_weights import PriorWeights
from engine.vocab.session_vocab import Owner, SessionVocab
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.vocab.bigram_graph import BigramGraph, build_bigram_graph
from engine.vocab.prior import NUM_FEATURES
from kernels import native_prior

VOCAB = 60

pytestmark = pytest.mark.skipif(not native_prior.is_available(), reason="no compiled kernels here")


def make_session(rng: np.random.Generator, sizes: NgramSizes) -> SessionVocab:
    """One that has said something, the same things more than once, some of it long ago."""
    ngrams = SessionNgrams(VOCAB, sizes, half_life=20.0)
    weights = PriorWeights((rng.random(NUM_FEATURES) * 3).tolist())
    session = SessionVocab(Owner("t", None), 0, CoreSet(VOCAB, None), None, ngrams, weights)
    session.observe_prompt(rng.integers(0, 12, rng.integers(0, 200)).tolist())
    return session


def make_prior(compiled: bool, order: int, graph: BigramGraph | None, matches: bool) -> DraftPrior:
    prior = DraftPrior(True, order, graph, matches)
    if not compiled:
        prior.kernel = None
    return prior


def make_candidates(rng: np.random.Generator, rows: int, columns: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    token_ids = np.stack([rng.permutation(VOCAB)[:columns] for _ in range(rows)]).astype(np.int32)
    logits = -np.sort(-rng.normal(size=(rows, columns)).astype(np.float32) * 2, axis=1)
    missing = rng.integers(0, columns, rows)
    for row, count in enumerate(missing):
        token_ids[row, columns - count :], logits[row, columns - count :] = -1, -np.inf
    return token_ids, logits


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    order=st.integers(1, 3),
    with_graph=st.booleans(),
    matches=st.booleans(),
    sizes=st.sampled_from([NgramSizes(8, 3, 8, 2), NgramSizes(64, 16, 256, 4)]),
)
def test_kernel_and_numpy_agree(
    seed: int, rows: int, columns: int, order: int, with_graph: bool, matches: bool, sizes: NgramSizes
) -> None:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 12, 3000).astype(np.int32)
    graph = build_bigram_graph([text], VOCAB) if with_graph else None
    sessions = [make_session(rng, sizes) for _ in range(rows)]
    contexts = [tuple(pair) for pair in rng.integers(-1, 12, (rows, 2)).tolist()]
    drafts = [rng.integers(0, 12, rng.integers(0, 4)).tolist() for _ in range(rows)]
    token_ids, logits = make_candidates(rng, rows, columns)
    targets, greedy = rng.integers(0, 12, rows).tolist(), (rng.random(rows) < 0.7).tolist()
    learned, gains = [], []
    results = []
    for compiled in (True, False):
        prior = make_prior(compiled, order, graph, matches)
        scores, drafted = prior.score(sessions, contexts, drafts, token_ids, logits, greedy)
        results.append((scores, drafted[0].candidates.features))
        before = [(one.weights.learned.copy(), one.weights.gain, one.weights.repeat_gain) for one in sessions]
        prior.learn(sessions, drafted, targets)
        learned.append([session.weights.learned.copy() for session in sessions])
        gains.append([(session.weights.gain, session.weights.repeat_gain) for session in sessions])
        for session, (weights, *gain) in zip(sessions, before, strict=True):
            session.weights.learned[:] = weights
            session.weights.gain, session.weights.repeat_gain = gain
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-5)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-4)
    assert np.array(learned[0]) == pytest.approx(np.array(learned[1]), rel=1e-4, abs=1e-5)
    assert gains[0] == gains[1]


def test_infinite_logits_teach_nothing() -> None:
    """Of a draft that has gone wrong; otherwise the weights would be no numbers for good."""
    rng = np.random.default_rng(0)
    session = make_session(rng, NgramSizes(8, 3, 8, 2))
    token_ids, logits = np.arange(4, dtype=np.int32)[None], np.array([[0.0, np.inf, 1.0, 0.5]], np.float32)
    prior = make_prior(compiled=True, order=3, graph=None, matches=False)
    _, drafted = prior.score([session], [(1, 2)], [[]], token_ids, logits, [True])
    before = session.weights.learned.tolist()
    prior.learn([session], drafted, [2])
    assert session.weights.learned.tolist() == before
