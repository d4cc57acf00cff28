"""A session's counts: as a dictionary would have them while they fit, bounded and the strongest when they do not."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.kernels.session_options import Table, TableSizes
from tests.counted_session import CountedSession

VOCAB = 64
SMALL = TableSizes(bigram_rows=16, bigram_width=2, trigram_rows=16, trigram_width=2)
AMPLE = TableSizes(bigram_rows=512, bigram_width=64, trigram_rows=1024, trigram_width=64)
"""Nothing is ever overwritten."""
NO_DECAY = 1e12
LIMITS = (1000, 1000, 1000)

texts = st.lists(st.integers(0, VOCAB - 1), max_size=60)


def contents(table: Table) -> dict[tuple[int, int], float]:
    keys = np.repeat(table.keys, table.token_ids.shape[1])
    pairs = zip(keys.tolist(), table.token_ids.ravel().tolist(), strict=True)
    return {pair: count for pair, count in zip(pairs, table.counts.ravel().tolist(), strict=True) if count > 0}


@given(text=texts, cut=st.integers(0, 60))
def test_counts_every_ngram_once_however_the_text_arrives(text: list[int], cut: int) -> None:
    session = CountedSession(VOCAB, AMPLE, half_life=NO_DECAY)
    session.observe(text[:cut])
    session.observe(text[cut:])
    assert session.num_tokens == len(text)
    for order in (1, 2, 3):
        expected = Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))
        for ngram, count in expected.items():
            assert session.count(ngram) == pytest.approx(count)
        assert session.count([VOCAB - 1] * order) == pytest.approx(expected[(VOCAB - 1,) * order])
        stored = session.strongest(LIMITS)[order - 1]
        assert {tuple(row) for row in stored.token_ids.tolist()} == set(expected)


def test_a_count_halves_in_a_half_life() -> None:
    session = CountedSession(VOCAB, AMPLE, half_life=100.0)
    session.observe([1, 2, 3])
    session.observe([5] * 100)
    assert session.count([3]) == pytest.approx(0.5, rel=1e-4)
    assert session.count([1, 2]) == pytest.approx(0.5, rel=0.02)
    assert session.count([1, 2, 3]) == pytest.approx(0.5, rel=1e-4)


def test_counts_survive_a_renewed_unit() -> None:
    session = CountedSession(VOCAB, AMPLE, half_life=1.0)
    for _ in range(30):
        session.observe([1, 2, 3] * 5)
    assert np.isfinite(session.sessions.unigrams(0)).all()
    assert session.sessions.state(0).unit <= 1e30
    assert session.count([3]) == pytest.approx(1 / (1 - 0.5**3), rel=1e-3)
    assert session.count([1, 2, 3]) == pytest.approx(1 / (1 - 0.5**3), rel=1e-3)


@given(text=st.lists(st.integers(0, VOCAB - 1), max_size=400))
def test_memory_is_fixed_and_counts_never_exceed_the_truth(text: list[int]) -> None:
    session = CountedSession(VOCAB, SMALL, half_life=NO_DECAY)
    session.observe(text)
    table, unit = session.sessions.table(0, 2), session.sessions.state(0).unit
    pairs = Counter(pairwise(text))
    for (context, token_id), count in contents(table).items():
        assert 0 < count / unit <= pairs[context, token_id] * 1.001
    rows = table.keys[table.keys >= 0].tolist()
    assert len(set(rows)) == len(rows)


def test_a_strong_context_outlives_weak_ones() -> None:
    session = CountedSession(1000, SMALL, NO_DECAY)
    for _ in range(10):
        session.observe([7, 1])
    for token_id in range(100, 400):
        session.observe([token_id, 1, 1])
    assert session.count([7, 1]) == pytest.approx(10)
    assert (session.sessions.table(0, 2).keys >= 0).sum() == 16


@given(text=st.lists(st.integers(0, VOCAB - 1), max_size=400))
def test_restoring_more_than_fits_keeps_the_strongest_where_reads_find_them(text: list[int]) -> None:
    ample, small = CountedSession(VOCAB, AMPLE, NO_DECAY), CountedSession(VOCAB, SMALL, NO_DECAY)
    ample.observe(text)
    small.restore(ample.strongest(LIMITS), len(text))
    table = small.sessions.table(0, 2)
    for key in table.keys[table.keys >= 0].tolist():
        own = sorted((ample.count([key, other]) for other in range(VOCAB)), reverse=True)[:2]
        kept = sorted(table.counts[table.keys == key][0].tolist(), reverse=True)
        assert kept == pytest.approx(own)
    small.observe([1, 2, 3])  # finds its rows
    assert small.count([1, 2]) >= 0.999


@given(text=texts.filter(bool))
def test_snapshot_counts_restore(text: list[int]) -> None:
    session = CountedSession(VOCAB, AMPLE, half_life=50.0)
    session.observe(text)
    other = CountedSession(VOCAB, AMPLE, half_life=50.0)
    other.restore(session.strongest(LIMITS), session.num_tokens)
    assert other.num_tokens == len(text)
    for order in (1, 2, 3):
        for i in range(len(text) - order + 1):
            assert other.count(text[i : i + order]) == pytest.approx(session.count(text[i : i + order]), rel=1e-4)


def test_strongest_are_the_largest() -> None:
    session = CountedSession(VOCAB, AMPLE, half_life=NO_DECAY)
    session.observe([1, 2, 3] * 10 + [4, 5, 6])
    unigrams, bigrams, trigrams = session.strongest((3, 2, 2))
    assert sorted(unigrams.token_ids[:, 0].tolist()) == [1, 2, 3]
    assert sorted(map(tuple, bigrams.token_ids.tolist())) == [(1, 2), (2, 3)]
    assert len(trigrams.counts) == 2
    assert (1, 2, 3) in set(map(tuple, trigrams.token_ids.tolist()))
