"""The prior: its arithmetic against the definition, its weights on sessions that need them and on ones that do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from evospec.kernels.session_options import MAX_WEIGHT, NUM_FEATURES
from tests.reference.continuations import Continuations
from tests.reference.ngrams import SessionNgrams, lookup, presence
from tests.reference.prior import Candidates, FloatArray, bonus_features, gradient
from tests.reference.prior_weights import PriorWeights, learn

VOCAB = 500


def log_likelihood(candidates: Candidates, weights: FloatArray, targets: NDArray[np.int32]) -> FloatArray:
    """[B]: log softmax(scores) of the target's token, 0 where it is not among the candidates."""
    places, scores = candidates.find(targets), candidates.scores(weights)
    with np.errstate(invalid="ignore"):  # rows without a candidate
        chosen = scores[np.arange(len(places)), places] - np.logaddexp.reduce(scores, axis=1)
    return np.where(places >= 0, chosen, 0.0)


def random_candidates(rng: np.random.Generator, batch: int, width: int) -> tuple[Candidates, NDArray[np.int32]]:
    token_ids = np.stack([rng.permutation(VOCAB)[:width] for _ in range(batch)]).astype(np.int32)
    logits = rng.normal(size=(batch, width))
    logits[:, 1:][rng.random((batch, width - 1)) < 0.3] = -np.inf
    targets = token_ids[np.arange(batch), rng.integers(0, width, batch)]
    return Candidates(token_ids, logits, rng.random((batch, width, NUM_FEATURES)) * 3), targets


@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 4), width=st.integers(2, 9))
def test_gradient_is_that_of_the_likelihood(seed: int, batch: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    candidates, targets = random_candidates(rng, batch, width)
    weights = rng.random((batch, NUM_FEATURES)) * 2
    analytic = gradient(candidates, weights, targets)
    for feature in range(NUM_FEATURES):
        moved = np.zeros(NUM_FEATURES)
        moved[feature] = 1e-5
        above, below = (log_likelihood(candidates, weights + sign * moved, targets) for sign in (1, -1))
        assert analytic[:, feature] == pytest.approx((above - below) / 2e-5, abs=1e-6)


def test_a_target_that_could_not_be_drafted_teaches_nothing() -> None:
    candidates, _ = random_candidates(np.random.default_rng(0), 2, 5)
    candidates.logits[0, 2] = -np.inf
    candidates.logits[1] = -np.inf
    weights = np.ones((2, NUM_FEATURES))
    for targets in ([candidates.token_ids[0, 2], candidates.token_ids[1, 0]], [VOCAB + 1, VOCAB + 1]):
        assert gradient(candidates, weights, np.array(targets, np.int32)).tolist() == [[0.0] * NUM_FEATURES] * 2
    assert np.isfinite(log_likelihood(candidates, weights, candidates.token_ids[:, 0])).all()


def test_infinite_logits_teach_nothing() -> None:
    """Of a draft that has gone wrong; otherwise the weights would be no numbers for good."""
    candidates, targets = random_candidates(np.random.default_rng(3), 2, 6)
    candidates.logits[:, 1] = np.inf
    weights = PriorWeights([1.0] * NUM_FEATURES)
    learn([weights, weights], candidates, targets)
    assert weights.learned.tolist() == [1.0] * NUM_FEATURES


class Session:
    """A synthetic session: text that repeats itself or not, and a draft that is right or not."""

    def __init__(self, repeats: float, draft_accuracy: float, sharpness: float, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.repeats, self.draft_accuracy, self.sharpness = repeats, draft_accuracy, sharpness
        self.text = self.rng.integers(0, VOCAB, 200).tolist()
        self.ngrams = SessionNgrams(VOCAB)
        self.ngrams.observe(self.text)
        self.copied_from = 0

    def next_token(self) -> int:
        """Most often what followed last time, else anything; then copying goes on elsewhere."""
        self.copied_from += 1
        if self.rng.random() >= self.repeats or self.copied_from >= len(self.text):
            self.copied_from = int(self.rng.integers(0, len(self.text)))
            return int(self.rng.integers(0, VOCAB))
        return int(self.text[self.copied_from])

    def draft(self, target: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        others = self.rng.permutation(VOCAB)[:20]
        token_ids = np.array([target, *others[others != target]], np.int32)
        logits = self.rng.normal(size=len(token_ids)).astype(np.float32)
        if self.rng.random() < self.draft_accuracy:
            logits[0] = logits.max() + 1.0
        return token_ids[None], logits[None] * np.float32(self.sharpness)

    def run(self, weights: PriorWeights, steps: int) -> tuple[float, float]:
        """Agreement of the draft's first choice with the target, with and without the prior."""
        with_prior, without = 0, 0
        for _ in range(steps):
            target = self.next_token()
            own, logits = self.draft(target)
            bigrams, trigrams = lookup([self.ngrams], [(self.text[-2], self.text[-1])])
            token_ids, scores = with_continuations(own, logits, [bigrams, trigrams])
            features = bonus_features(token_ids, presence([self.ngrams], token_ids), bigrams, trigrams, None, None)
            candidates = Candidates(token_ids, scores, features)
            with_prior += token_ids[0, candidates.scores(weights.bonus[None])[0].argmax()] == target
            without += token_ids[0, scores[0].argmax()] == target
            learn([weights], candidates, np.array([target], np.int32))
            self.ngrams.observe([target], self.text[-2:])
            self.text.append(target)
        return with_prior / steps, without / steps


def with_continuations(
    token_ids: NDArray[np.int32], logits: NDArray[np.float32], sources: list[Continuations]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The draft's candidates, and those of the session that are not among them with a middling logit."""
    known = token_ids
    for source in sources:
        is_known = (source.token_ids[:, :, None] == known[:, None, :]).any(axis=2)
        known = np.concatenate([known, np.where(is_known, np.int32(-1), source.token_ids)], axis=1)
    extra = np.where(known[:, token_ids.shape[1] :] >= 0, logits.mean(), np.float32(-np.inf))
    return known, np.concatenate([logits, extra], axis=1)


def test_weights_grow_where_the_session_repeats_itself() -> None:
    weights = PriorWeights()
    with_prior, without = Session(repeats=0.9, draft_accuracy=0.4, sharpness=1.0).run(weights, 800)
    assert weights.learned[1:3].min() > 0.5
    assert with_prior > without + 0.15


def test_weights_fade_where_the_draft_is_right_and_ngrams_mislead() -> None:
    weights = PriorWeights([1.0, 1.0, 3.0, 0.0, 0.0])
    session = Session(repeats=0.0, draft_accuracy=0.97, sharpness=1.0)
    session.text = (session.text[:20] * 20)[:200]  # its pairs and triples look sure, and nothing comes of them
    session.ngrams.observe(session.text)

    def misled() -> int:
        session.text[-2:] = session.text[:2]
        return int(session.rng.integers(0, VOCAB))

    session.next_token = misled  # type: ignore[method-assign]
    session.run(weights, 600)
    assert weights.learned.max() < 0.1
    with_prior, without = session.run(weights, 300)
    assert with_prior >= without - 0.01


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 3.0])
def test_the_prior_gets_out_of_the_way_of_a_draft_that_is_right_but_unsure(sharpness: float) -> None:
    """At sharpness 0.2, without counting hits, it would cost a third of them."""
    with_prior, without = Session(repeats=0.64, draft_accuracy=0.9, sharpness=sharpness).run(PriorWeights(), 800)
    assert with_prior >= without - 0.01


def test_weights_are_kept_within_their_range() -> None:
    weights = PriorWeights([-1.0, 5.0, 1e9, 0.0, 0.0])
    assert weights.learned.tolist() == [0.0, 5.0, MAX_WEIGHT, 0.0, 0.0]
    for _ in range(100):
        weights.step(np.array([100.0, -100.0, 0.0, 1.0, 0.0]), 0)
    assert weights.learned == pytest.approx([MAX_WEIGHT, 0.0, MAX_WEIGHT, 5.0, 0.0], rel=1e-4)


def test_the_prior_is_left_out_while_it_costs_hits() -> None:
    weights = PriorWeights([1.0] * NUM_FEATURES)
    weights.step(np.zeros(NUM_FEATURES), -1)
    assert weights.bonus.tolist() == [0.0] * NUM_FEATURES
    assert weights.learned.tolist() == [1.0] * NUM_FEATURES
    weights.step(np.zeros(NUM_FEATURES), 1)
    assert weights.bonus.tolist() == [1.0] * NUM_FEATURES
