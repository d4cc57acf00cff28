"""Two requests of one session at the same time: what both have learned becomes one snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.draft_vocab.ngram_counts import NgramCounts
from engine.draft_vocab.prior import HALF_LIFE
from engine.draft_vocab.snapshot import SessionSnapshot, make_snapshot


def merge(
    a: SessionSnapshot, b: SessionSnapshot, base: SessionSnapshot | None = None, half_life: float = HALF_LIFE
) -> SessionSnapshot:
    """Both requests' news on top of what they started from; ``merge(a, b, base) == merge(b, a, base)``.

    Counts: those of the base, decayed by the longer request, and what either has above them. Tails: the union, by the
    better of the two ranks. Weights: the mean, by the number of tokens each has verified.

    Args:
        a: one request's snapshot.
        b: the other's; of the same vocabulary.
        base: what both started from; None if they started cold.
        half_life: of counts, in tokens observed.
    """
    base_verified, base_observed = (base.num_verified_tokens, base.num_observed_tokens) if base else (0, 0)
    verified = [max(side.num_verified_tokens - base_verified, 0) for side in (a, b)]
    observed = [max(side.num_observed_tokens - base_observed, 0) for side in (a, b)]
    decays = [2.0 ** (-tokens / half_life) for tokens in observed]
    orders = range(len(a.ngrams))
    base_counts = base.ngram_counts() if base else [_none(order + 1) for order in orders]
    return make_snapshot(
        vocabulary=a.vocabulary,
        num_verified_tokens=base_verified + sum(verified),
        num_observed_tokens=base_observed + sum(observed),
        weights=_mean_weights(a.weights, b.weights, verified),
        tail=_merge_tails(a.tail_token_ids(), b.tail_token_ids()),
        ngrams=[
            _merge_counts(a.ngram_counts()[order], b.ngram_counts()[order], base_counts[order], decays)
            for order in orders
        ],
    )


def _none(order: int) -> NgramCounts:
    return NgramCounts(np.empty((0, order), np.int32), np.empty(0, np.float32))


def _mean_weights(a: Sequence[float], b: Sequence[float], verified: Sequence[int]) -> list[float]:
    share_a, share_b = verified if sum(verified) else (1, 1)
    total = share_a + share_b
    return [(share_a * of_a + share_b * of_b) / total for of_a, of_b in zip(a, b, strict=True)]


def _merge_tails(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """By the better rank; of two at the same rank, the one that both have or that the other ranks higher."""
    ranks: dict[int, list[int]] = {}
    absent = len(a) + len(b)
    for side, tail in enumerate((a, b)):
        for rank, token_id in enumerate(tail):
            ranks.setdefault(token_id, [absent, absent])[side] = rank
    return sorted(ranks, key=lambda token_id: (min(ranks[token_id]), max(ranks[token_id]), token_id))


def _merge_counts(a: NgramCounts, b: NgramCounts, base: NgramCounts, decays: Sequence[float]) -> NgramCounts:
    token_ids = np.concatenate([side.token_ids for side in (a, b, base)])
    ngrams, places = _distinct(token_ids)
    chunks = np.split(places, np.cumsum([len(a.counts), len(b.counts)]))
    dense = np.zeros((3, len(ngrams)), np.float32)
    for row, chunk, side in zip(dense, chunks, (a, b, base), strict=True):
        row[chunk] = side.counts
    news = [np.maximum(row - dense[2] * np.float32(decay), 0.0) for row, decay in zip(dense[:2], decays, strict=True)]
    return NgramCounts(ngrams, dense[2] * np.float32(min(decays)) + (news[0] + news[1]))


def _distinct(token_ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """[n, order] → the distinct rows, and [n] which of them each row is; ``np.unique`` of rows is slower."""
    labels = token_ids[:, 0].astype(np.int64)
    for column in token_ids.T[1:]:
        labels = np.unique(labels, return_inverse=True)[1] << 31 | column
    _, first, places = np.unique(labels, return_index=True, return_inverse=True)
    return token_ids[first], places
