"""A prior on draft logits from what a session has said, with weights learned while it is served (ours).

A light draft misses what a session repeats; a strong one copies it by itself. So each candidate gets a bonus
``features @ weights``, and each verified position moves the weights by one step of gradient ascent on
log softmax(logits + bonus)[the target's token]. Where the draft needs no help they fade to zero.

Everything here is arrays over a batch of rows: one row is one position of one session.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evospec.kernels.session_options import NUM_FEATURES
from tests.reference.continuations import Continuations

FloatArray = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that B rows choose among.

    ``token_ids`` [B, C] int32, -1 for none; ``logits`` [B, C], the draft's own, -inf for none or unknown;
    ``features`` [B, C, NUM_FEATURES], none negative.
    """

    token_ids: NDArray[np.int32]
    logits: FloatArray
    features: FloatArray

    def scores(self, weights: FloatArray) -> FloatArray:
        """Logits with the prior: [B, C].

        Args:
            weights: [B, NUM_FEATURES].
        """
        scores: FloatArray = self.logits + np.matmul(self.features, weights[:, :, None])[:, :, 0]
        return scores

    def find(self, token_ids: NDArray[np.int32]) -> NDArray[np.intp]:
        """[B]: the place of one token a row among the candidates that have a logit, -1 if it is not."""
        same = (self.token_ids == token_ids[:, None]) & np.isfinite(self.logits)
        return np.where(same.any(axis=1), same.argmax(axis=1), -1)


def bonus_features(
    token_ids: NDArray[np.int32],
    in_session: NDArray[np.float32],
    bigrams: Continuations,
    trigrams: Continuations,
    graph: Continuations | None,
    matches: Continuations | None,
) -> NDArray[np.float32]:
    """What speaks for each candidate, [B, C, NUM_FEATURES], in the order of ``FEATURES``.

    Args:
        token_ids: [B, C], -1 for none.
        in_session: [B, C], 1 or 0.
        bigrams: what followed each row's last token in its session.
        trigrams: what followed its last two.
        graph: what follows the last token in general text; None without such a graph.
        matches: what followed the longest repeats of the sequence's last tokens in its own text; None: not looked at.
    """
    features = np.zeros((*token_ids.shape, NUM_FEATURES), np.float32)
    features[:, :, 0] = in_session
    features[:, :, 1] = bigrams.at(token_ids)
    features[:, :, 2] = trigrams.at(token_ids)
    if graph is not None:
        features[:, :, 3] = graph.at(token_ids)
    if matches is not None:
        features[:, :, 4] = matches.at(token_ids)
    return features


def gradient(candidates: Candidates, weights: FloatArray, targets: NDArray[np.int32]) -> FloatArray:
    """d log softmax(scores)[target] / d weights, [B, NUM_FEATURES]: the target's features less those expected.

    0 where the target's token is not among the candidates, and where a logit is infinite.

    Args:
        candidates: B rows.
        weights: [B, NUM_FEATURES].
        targets: [B], the token that the target chose.
    """
    places = candidates.find(targets)
    scores = candidates.scores(weights)
    probabilities = np.exp(_shifted(scores))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = np.matmul(probabilities[:, None, :], candidates.features)[:, 0]
    gradients: FloatArray = candidates.features[np.arange(len(places)), places] - expected
    teaches = (places >= 0) & np.isfinite(scores.max(axis=1))
    return np.where(teaches[:, None], gradients, 0.0)


def _shifted(scores: FloatArray) -> FloatArray:
    """Scores less each row's largest, which is what keeps exp finite; rows without a candidate stay harmless."""
    largest = scores.max(axis=1, keepdims=True)
    shifted: FloatArray = np.where(np.isfinite(largest), scores - np.where(np.isfinite(largest), largest, 0.0), 0.0)
    return shifted
