"""What compiled sessions are told, and what they tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEATURES = ("in_session", "bigram", "trigram", "graph", "match")
"""What speaks for a candidate: in the session (0 or 1), log(1 + count) after the last token and after the last two,
log-probability after the last token in general text, scaled to 0 .. 1, and log(length) of the longest repeat that it
would continue in the sequence's own text."""
NUM_FEATURES = len(FEATURES)
SOURCES = ("snapshot", "tenant", "context", "target", "graph", "semantic")
"""What named a token of a tail: the session's or the tenant's past, its own text, the target, an index."""
WAYS = 8
"""Rows of a table in which a context can live."""
MAX_REPEATS = 16
"""Places of a repeat that are looked at."""
MAX_WEIGHT = 10.0
"""Of a feature of the prior."""
HALF_LIFE = 4096.0
"""Tokens after which a count is worth half."""
PRESENCE = 0.05
"""A decayed count below this is a token that the session has left behind."""


def drafted_ints(columns: int) -> int:
    """Numbers that are kept of a draft token: itself, and the tokens, logits and features of ``columns`` candidates."""
    return 1 + (2 + NUM_FEATURES) * columns


@dataclass(frozen=True)
class Table:
    """A session's counts of one order: ``keys`` [R] int64, -1 for none; ``token_ids`` [R, W]; ``counts`` [R, W].

    A context lives in one of the ``WAYS`` rows from the one on that the first 64 - ``shift`` bits of its hash name.
    """

    keys: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    counts: NDArray[np.float32]
    shift: int


@dataclass(frozen=True)
class TableSizes:
    """Contexts (a power of 2), and continuations of each: 592 KiB a session, and 4 bytes for each token."""

    bigram_rows: int = 2048
    bigram_width: int = 16
    trigram_rows: int = 8192
    trigram_width: int = 4


@dataclass(frozen=True)
class GraphArrays:
    """Followers of each token, the most likely first: those of u at ``offsets[u]`` .. ``offsets[u + 1] - 1``.

    ``offsets`` [vocab + 1], the others [edges]. The prior looks at ``width`` followers of a token; the value of one is
    1 + its log-probability times ``scale``.
    """

    offsets: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    width: int
    scale: float


@dataclass(frozen=True)
class SessionOptions:
    """How sessions learn, and what fills their tails."""

    num_sessions: int
    num_places: int
    """Tokens of a tail; 0: there are no tails."""
    only_recency: bool = False
    """Whether a full tail forgets what was used longest ago (LRU), instead of by ARC."""
    in_context: bool = True
    """Whether a sequence's own tokens enter its tail."""
    learns: bool = True
    """Whether the prior's weights follow verification."""
    uses: Sequence[bool] = (True,) * NUM_FEATURES
    """Which features of the prior count."""
    learning_rate: float = 0.05
    most_weight: float = MAX_WEIGHT
    gain_memory: float = 0.99
    """Weight of the past, for each position, in what the prior has gained."""
    half_life: float = HALF_LIFE
    presence: float = PRESENCE
    num_tenants: int = 0
    """Tables of what followed what in each tenant's texts; 0: nothing enters tails by that."""
    tenant_rows: int = 4096
    tenant_width: int = 16
    sizes: TableSizes = TableSizes()
