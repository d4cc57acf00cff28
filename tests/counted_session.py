"""One compiled session, of which tests ask what it has counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evospec.engine.draft_vocab.ngram_counts import NgramCounts, restore, strongest
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.session_library import TokenRows
from evospec.kernels.session_options import HALF_LIFE, NUM_FEATURES, SessionOptions, TableSizes


class CountedSession:
    """A session without a tail."""

    def __init__(self, vocab_size: int, sizes: TableSizes | None = None, half_life: float = HALF_LIFE) -> None:
        options = SessionOptions(1, 0, sizes=sizes or TableSizes(), half_life=half_life)
        self.sessions = Sessions(options, np.full(vocab_size, True))
        self.sessions.clear(0, [0.0] * NUM_FEATURES)

    @property
    def num_tokens(self) -> int:
        return int(self.sessions.counts(0).num_counted)

    def observe(self, token_ids: Sequence[int]) -> None:
        """The session goes on with some tokens."""
        rows = TokenRows()
        rows.add(0, token_ids)
        self.sessions.catch_up(rows)

    def count(self, ngram: Sequence[int]) -> float:
        """The decayed count of one, two or three tokens in a row; 0 if unknown."""
        *context, token_id = ngram
        unit: float = self.sessions.state(0).unit
        if not context:
            return float(self.sessions.unigrams(0)[token_id]) / unit
        table = self.sessions.table(0, len(ngram))
        key = context[0] if len(context) == 1 else context[0] << 31 | context[1]
        of_context = (table.keys == key)[:, None] & (table.token_ids == token_id)
        return float(table.counts[of_context].sum()) / unit

    def strongest(self, limits: Sequence[int]) -> list[NgramCounts]:
        return strongest(self.sessions, 0, limits)

    def restore(self, ngrams: Sequence[NgramCounts], num_tokens: int) -> None:
        """Start from the counts of a snapshot."""
        restore(self.sessions, 0, ngrams)
        self.sessions.counts(0).num_counted = num_tokens
