"""A session's counts of tokens, pairs and triples on their way into a snapshot, and out of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evospec.kernels.native_sessions import Sessions
from evospec.kernels.session_options import PRESENCE, WAYS, Table

_HASH = 0x9E3779B97F4A7C15
_ID_BITS = 31


@dataclass(frozen=True)
class NgramCounts:
    """N-grams of one order: ``token_ids`` [n, order] int32, last what followed the others; ``counts`` [n] float32."""

    token_ids: NDArray[np.int32]
    counts: NDArray[np.float32]


def strongest(sessions: Sessions, session: int, limits: Sequence[int]) -> list[NgramCounts]:
    """The largest counts of each order: at most ``limits[order - 1]``, in no order, as numbers of occurrences."""
    unit, unigrams = sessions.state(session).unit, sessions.unigrams(session)
    least = PRESENCE * unit
    places = _largest(unigrams, limits[0], least)
    pairs, triples = (sessions.table(session, order) for order in (2, 3))
    of_pairs = _largest(pairs.counts.reshape(-1), limits[1], least)
    of_triples = _largest(triples.counts.reshape(-1), limits[2], least)
    contexts = triples.keys[of_triples // triples.token_ids.shape[1]]
    columns = [
        (places,),
        (pairs.keys[of_pairs // pairs.token_ids.shape[1]], pairs.token_ids.reshape(-1)[of_pairs]),
        (contexts >> _ID_BITS, contexts & (1 << _ID_BITS) - 1, triples.token_ids.reshape(-1)[of_triples]),
    ]
    counts = unigrams[places], pairs.counts.reshape(-1)[of_pairs], triples.counts.reshape(-1)[of_triples]
    return [
        NgramCounts(np.stack(tokens, axis=1).astype(np.int32), of_tokens / np.float32(unit))
        for tokens, of_tokens in zip(columns, counts, strict=True)
    ]


def restore(sessions: Sessions, session: int, ngrams: Sequence[NgramCounts]) -> None:
    """Give a session that was just cleared the counts of a snapshot; ids below the vocabulary's size, none twice."""
    unigrams, bigrams, trigrams = ngrams
    sessions.unigrams(session)[unigrams.token_ids[:, 0]] = unigrams.counts
    pairs, triples = bigrams.token_ids.T, trigrams.token_ids.astype(np.int64).T
    _fill(sessions.table(session, 2), pairs[0].astype(np.int64), pairs[1], bigrams.counts)
    _fill(sessions.table(session, 3), triples[0] << _ID_BITS | triples[1], trigrams.token_ids[:, 2], trigrams.counts)


def _largest(counts: NDArray[np.float32], limit: int, least: float) -> NDArray[np.intp]:
    """Places of the ``limit`` largest counts that are ``least`` or more."""
    places = np.flatnonzero(counts >= least)
    if len(places) > limit:
        places = places[np.argpartition(-counts[places], limit)[:limit]]
    return places


def _fill(table: Table, contexts: NDArray[np.int64], token_ids: NDArray[np.int32], counts: NDArray[np.float32]) -> None:
    """Put counts into an empty table, the strongest of those that do not all fit where the table would put them."""
    # By example, of two contexts with the same home, the row 8: tokens 1 and 2 were counted 2.0 and 1.0 times after
    # context 7, token 3 was counted 5.0 times after context 12.
    #   contexts    7  7  12      sorted, the strongest token of each first
    #   context_of  0  0  1       which of keys 7, 12 each is; their weights are 3.0 and 5.0, and so their ways 1 and 0
    #   columns     0  1  0
    #   rows        9  9  8       home + way
    order = np.lexsort((-counts, contexts))
    contexts, token_ids, counts = contexts[order], token_ids[order], counts[order]
    keys, starts, context_of = np.unique(contexts, return_index=True, return_inverse=True)
    columns = np.arange(len(contexts)) - starts[context_of]
    groups = keys.astype(np.uint64) * np.uint64(_HASH) >> np.uint64(table.shift)
    homes = groups.astype(np.min_scalar_type(len(table.keys))) * WAYS  # numbers of two bytes are sorted sooner
    weights = np.bincount(context_of, counts, len(keys))
    heaviest_first = np.lexsort((-weights, homes))
    ways = np.empty(len(keys), np.int64)
    ways[heaviest_first] = _ranks(homes[heaviest_first])
    kept = (ways[context_of] < WAYS) & (columns < table.token_ids.shape[1])
    rows = (homes + ways)[context_of[kept]]
    table.keys[rows] = contexts[kept]
    table.token_ids[rows, columns[kept]] = token_ids[kept]
    table.counts[rows, columns[kept]] = counts[kept]


def _ranks(ascending: NDArray[Any]) -> NDArray[np.int64]:
    """[n] sorted values → how many equal ones stand before each."""
    ranks: NDArray[np.int64] = np.arange(len(ascending)) - np.searchsorted(ascending, ascending)
    return ranks
