"""Where the prior on draft logits begins, and what it forgets; kernels/csrc/sessions/prior.cpp computes it."""

from __future__ import annotations

MAX_WEIGHT = 10.0
LIGHT_DRAFT_WEIGHTS = (0.5, 0.5, 1.0, 0.2, 1.5)
"""[NUM_FEATURES]: of ``prior`` fixed, and where the first session of a tenant begins with a light draft."""
HALF_LIFE = 4096.0
"""Tokens after which a count is worth half."""
PRESENCE = 0.05
"""A decayed count below this is a token that the session has left behind."""
