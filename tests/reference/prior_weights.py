"""The weights of a session's prior, and how they follow what verification shows (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evospec.kernels.session_options import MAX_WEIGHT, NUM_FEATURES
from tests.reference.prior import Candidates, FloatArray, gradient

LEARNING_RATE = 0.05
_GAIN_MEMORY = 0.99
"""Weight of the past in ``gain``, for each verified position."""

_NO_BONUS: NDArray[np.float32] = np.zeros(NUM_FEATURES, np.float32)


class PriorWeights:
    """Non-negative weights of one session, and whether they have helped lately.

    Likelihood and agreement are not the same: with a draft that is right but unsure of itself, weights that make the
    target's tokens likelier can still cost agreement. So hits are counted with and without the prior, and it is left
    out while it costs more than it brings. It goes on learning meanwhile.

    Args:
        start: [NUM_FEATURES] to begin with, such as the tenant's; zeros by default.
    """

    def __init__(self, start: Sequence[float] | None = None) -> None:
        self.learned: NDArray[np.float32] = np.zeros(NUM_FEATURES, np.float32)
        """[NUM_FEATURES]: to be kept for the session's next request."""
        if start is not None:
            self.learned[:] = np.clip(start, 0.0, MAX_WEIGHT)
        self.gain = 0.0
        """Positions where only the prior's first choice was the target's, less those where only the draft's own was;
        fading."""
        self.num_lessons = 0
        """Positions learned from."""

    @property
    def bonus(self) -> NDArray[np.float32]:
        """[NUM_FEATURES]: what to weigh the features with now; zeros while the prior costs agreement."""
        return self.learned if self.gain >= 0.0 else _NO_BONUS

    def step(self, ascent: FloatArray, advantage: int) -> None:
        """Learn from one verified position.

        Args:
            ascent: [NUM_FEATURES], the gradient of the log-likelihood.
            advantage: 1 if only the prior's first choice was right, -1 if only the draft's own was, else 0.
        """
        np.clip(self.learned + LEARNING_RATE * ascent, 0.0, MAX_WEIGHT, out=self.learned)
        self.num_lessons += 1
        self.gain = self.gain * _GAIN_MEMORY + advantage


def learn(owners: Sequence[PriorWeights], candidates: Candidates, targets: NDArray[np.int32]) -> None:
    """One step for each verified position, all gradients taken at the weights before.

    Positions whose target token is not among the candidates teach nothing.

    Args:
        owners: whose weights each row is about; the same may come more than once.
        candidates: as they were drafted from, B rows.
        targets: [B], the token that the target chose.
    """
    weights = np.stack([owner.learned for owner in owners])
    ascents = gradient(candidates, weights, targets)
    scores = candidates.scores(weights)
    without, with_prior = (_first_choices(candidates, one) == targets for one in (candidates.logits, scores))
    advantages = (with_prior.astype(np.int64) - without).tolist()
    for owner, ascent, advantage in zip(owners, ascents, advantages, strict=True):
        owner.step(ascent, advantage)


def _first_choices(candidates: Candidates, scores: FloatArray) -> NDArray[np.int32]:
    best = scores.argmax(axis=1)
    choices: NDArray[np.int32] = candidates.token_ids[np.arange(len(best)), best]
    return choices
