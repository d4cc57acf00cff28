"""What a session has said so far, as decayed counts of single tokens, pairs and triples for the prior (ours).

All of it sits in arrays of fixed size, so that a kernel can look it up without waiting for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tests.reference.context_table import ContextTable
from tests.reference.continuations import Continuations

HALF_LIFE = 4096.0
"""Tokens after which a count is worth half."""
PRESENCE_FLOOR = 0.05
"""A decayed count below this is a token that the session has left behind."""
_ID_BITS = 31
_MAX_UNIT = 1e30


@dataclass(frozen=True)
class NgramSizes:
    """Rows (contexts) and continuations of each: 592 KiB a session, and 4 bytes for each token of the vocabulary."""

    bigram_rows: int = 2048
    bigram_width: int = 16
    trigram_rows: int = 8192
    trigram_width: int = 4


class SessionNgrams:
    """Counts of one session's tokens and of what followed one and two tokens before.

    Every token observed makes all earlier counts worth a little less (half after ``half_life`` tokens).

    Args:
        vocab_size: token ids are below.
        sizes: of the tables.
        half_life: in tokens.
    """

    def __init__(self, vocab_size: int, sizes: NgramSizes | None = None, half_life: float = HALF_LIFE) -> None:
        sizes = sizes or NgramSizes()
        self.vocab_size = vocab_size
        self.num_tokens = 0
        """Tokens observed, those behind restored counts included."""
        self.unigrams: NDArray[np.float32] = np.zeros(vocab_size, np.float32)
        """[vocab]; like all counts here in units of ``unit``."""
        self.bigrams = ContextTable(sizes.bigram_rows, sizes.bigram_width)
        self.trigrams = ContextTable(sizes.trigram_rows, sizes.trigram_width)
        self.unit = 1.0
        """What one occurrence adds now: it grows, where the counts would have to shrink."""
        self._growth = 2.0 ** (1.0 / half_life)
        self._unigrams_view = cast("memoryview[float]", self.unigrams.data)

    def observe(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> None:
        """Count a run of tokens.

        Args:
            token_ids: the session's next tokens.
            before: the tokens right before them, of which the last two are context.
        """
        two_ago, one_ago = [-1, -1, *before[-2:]][-2:]
        self._observe(token_ids, two_ago, one_ago)
        self.num_tokens += len(token_ids)
        if self.unit > _MAX_UNIT:
            self._rescale()

    def _observe(self, token_ids: Sequence[int], two_ago: int, one_ago: int) -> None:
        for token_id in token_ids:
            self.unit *= self._growth
            self._unigrams_view[token_id] += self.unit
            if one_ago >= 0:
                self.bigrams.add(one_ago, token_id, self.unit)
                if two_ago >= 0:
                    self.trigrams.add(_pair(two_ago, one_ago), token_id, self.unit)
            two_ago, one_ago = one_ago, token_id

    def count(self, ngram: Sequence[int]) -> float:
        """The decayed count of one, two or three tokens in a row; 0 if unknown."""
        *context, token_id = ngram
        if not context:
            return float(self.unigrams[token_id]) / self.unit
        table, key = (self.bigrams, context[0]) if len(context) == 1 else (self.trigrams, _pair(*context))
        row = table.find(key)
        if row < 0:
            return 0.0
        return float(table.counts[row] @ (table.token_ids[row] == token_id)) / self.unit

    def knows(self, token_ids: Sequence[int]) -> list[bool]:
        """Whether the session has had each three tokens in a row of some."""
        ids = np.array(token_ids, np.int64)
        if len(ids) < 3:
            return []
        known: list[bool] = self.trigrams.have(ids[:-2] << _ID_BITS | ids[1:-1], ids[2:]).tolist()
        return known

    def _rescale(self) -> None:
        self.unigrams /= np.float32(self.unit)
        self.bigrams.scale(1.0 / self.unit)
        self.trigrams.scale(1.0 / self.unit)
        self.unit = 1.0


def presence(sessions: Sequence[SessionNgrams], token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """[B, C] tokens, one row a session → [B, C]: 1 where the session has had the token not too long ago, else 0.

    Ids of -1 give 0.
    """
    result = np.empty(token_ids.shape, np.float32)
    for row, session in enumerate(sessions):
        result[row] = session.unigrams[token_ids[row]] >= PRESENCE_FLOOR * session.unit
    result[token_ids < 0] = 0.0
    return result


def lookup(
    sessions: Sequence[SessionNgrams], contexts: Sequence[tuple[int, int]]
) -> tuple[Continuations, Continuations]:
    """What followed each context in its session; values are log(1 + count).

    Args:
        sessions: B of them, all with tables of the same sizes; the same one may come more than once.
        contexts: the last two tokens of each row, the older first; -1 for one that does not exist.

    Returns:
        The continuations of the last token, and of the last two.
    """
    bigrams = _empty(len(sessions), sessions[0].bigrams.width)
    trigrams = _empty(len(sessions), sessions[0].trigrams.width)
    for row, (session, (two_ago, one_ago)) in enumerate(zip(sessions, contexts, strict=True)):
        if one_ago >= 0:
            _copy(session.bigrams, one_ago, session.unit, bigrams, row)
            if two_ago >= 0:
                _copy(session.trigrams, _pair(two_ago, one_ago), session.unit, trigrams, row)
    np.log1p(bigrams.values, out=bigrams.values)
    np.log1p(trigrams.values, out=trigrams.values)
    return bigrams, trigrams


def _empty(num_rows: int, width: int) -> Continuations:
    return Continuations(np.full((num_rows, width), -1, np.int32), np.zeros((num_rows, width), np.float32))


def _copy(table: ContextTable, key: int, unit: float, into: Continuations, row: int) -> None:
    found = table.find(key)
    if found >= 0:
        into.token_ids[row] = table.token_ids[found]
        np.divide(table.counts[found], unit, out=into.values[row])


def _pair(two_ago: int, one_ago: int) -> int:
    return two_ago << _ID_BITS | one_ago
