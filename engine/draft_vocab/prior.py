"""What the prior on draft logits is made of (ours); the arithmetic is in kernels/csrc/sessions/prior.cpp."""

from __future__ import annotations

FEATURES = ("in_session", "bigram", "trigram", "graph", "match")
"""What speaks for a candidate: in the session (0 or 1), log(1 + count) after the last token and after the last two,
log-probability after the last token in general text, scaled to 0 .. 1, and log(length) of the longest repeat that it
would continue in the sequence's own text."""
NUM_FEATURES = len(FEATURES)
MAX_WEIGHT = 10.0
LIGHT_DRAFT_WEIGHTS = (0.5, 0.5, 1.0, 0.2, 1.5)
"""[NUM_FEATURES]: of ``prior`` fixed, and where the first session of a tenant begins with a light draft."""
HALF_LIFE = 4096.0
"""Tokens after which a count is worth half."""
PRESENCE = 0.05
"""A decayed count below this is a token that the session has left behind."""
