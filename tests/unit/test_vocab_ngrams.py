"""A session's counts: as a dictionary would have them while they fit, bounded and the strongest when they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from engine.vocab.context_table import WAYS, ContextTable, Entries
from engine.vocab.ngrams import NgramSizes, SessionNgrams, lookup, presence
from hypothesis import given
from hypothesis import strategies as st

from kernels import native_prior

VOCAB = 64
SMALL = NgramSizes(bigram_rows=16, bigram_width=2, trigram_rows=16, trigram_width=2)
AMPLE = NgramSizes(bigram_rows=512, bigram_width=64, trigram_rows=1024, trigram_width=64)
"""Nothing is ever overwritten."""
NO_DECAY = 1e12
LIMITS = (1000, 1000, 1000)

texts = st.lists(st.integers(0, VOCAB - 1), max_size=60)


@pytest.fixture(scope="module", autouse=True, params=["compiled", "python"])
def counting(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests count with the compiled kernels, where there are any, and without them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(native_prior, "is_available", lambda: False)
        yield


@given(text=st.lists(st.integers(0, 20), max_size=200), cut=st.integers(0, 200))
def test_both_ways_to_count_leave_the_same_tables(text: list[int], cut: int) -> None:
    sessions = SessionNgrams(VOCAB, SMALL, half_life=NO_DECAY), SessionNgrams(VOCAB, SMALL, half_life=NO_DECAY)
    sessions[0].observe(text[:cut])
    sessions[0].observe(text[cut:], before=text[:cut])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_prior, "is_available", lambda: False)
        sessions[1].observe(text)
    for name in ("bigrams", "trigrams"):
        tables = [getattr(session, name) for session in sessions]
        for array in ("keys", "token_ids", "counts"):
            assert np.array_equal(*(getattr(table, array) for table in tables)), (name, array)
    assert np.array_equal(sessions[0].unigrams, sessions[1].unigrams)


def contents(table: ContextTable) -> dict[tuple[int, int], float]:
    entries = table.entries(10**6, 1e-9)
    pairs = zip(entries.keys.tolist(), entries.token_ids.tolist(), strict=True)
    return dict(zip(pairs, entries.counts.tolist(), strict=True))


@given(text=texts, cut=st.integers(0, 60))
def test_counts_every_ngram_once_however_the_text_arrives(text: list[int], cut: int) -> None:
    session = SessionNgrams(VOCAB, AMPLE, half_life=NO_DECAY)
    session.observe(text[:cut])
    session.observe(text[cut:], before=text[:cut])
    assert session.num_tokens == len(text)
    for order in (1, 2, 3):
        expected = Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))
        for ngram, count in expected.items():
            assert session.count(ngram) == pytest.approx(count)
        assert session.count([VOCAB - 1] * order) == pytest.approx(expected[(VOCAB - 1,) * order])
        stored = session.strongest(LIMITS)[order - 1]
        assert {tuple(row) for row in stored.token_ids.tolist()} == set(expected)


@given(text=texts, other=texts)
def test_triples_are_known_once_they_were_there(text: list[int], other: list[int]) -> None:
    session = SessionNgrams(VOCAB, AMPLE, half_life=NO_DECAY)
    session.observe(text)
    seen = set(zip(text, text[1:], text[2:], strict=False))
    for asked in (text, other):
        assert session.knows(asked) == [triple in seen for triple in zip(asked, asked[1:], asked[2:], strict=False)]


def test_a_count_halves_in_a_half_life() -> None:
    session = SessionNgrams(VOCAB, AMPLE, half_life=100.0)
    session.observe([1, 2, 3])
    session.observe([5] * 100)
    assert session.count([3]) == pytest.approx(0.5, rel=1e-4)
    assert session.count([1, 2]) == pytest.approx(0.5, rel=0.02)
    assert session.count([1, 2, 3]) == pytest.approx(0.5, rel=1e-4)


def test_counts_survive_a_renewed_unit() -> None:
    session = SessionNgrams(VOCAB, AMPLE, half_life=1.0)
    for _ in range(30):
        session.observe([1, 2, 3] * 5)
    assert np.isfinite(session.unigrams).all()
    assert session.unit < 1e30
    assert session.count([3]) == pytest.approx(1 / (1 - 0.5**3), rel=1e-3)
    assert session.count([1, 2, 3]) == pytest.approx(1 / (1 - 0.5**3), rel=1e-3)


def test_tokens_left_behind_are_not_present() -> None:
    session = SessionNgrams(VOCAB, AMPLE, half_life=10.0)
    session.observe([1])
    session.observe([2] * 50)
    assert presence([session], np.array([[1, 2, 3, -1]], np.int32)).tolist() == [[0, 1, 0, 0]]


@given(text=st.lists(st.integers(0, VOCAB - 1), max_size=400))
def test_memory_is_fixed_and_counts_never_exceed_the_truth(text: list[int]) -> None:
    session = SessionNgrams(VOCAB, SMALL, half_life=NO_DECAY)
    size = session.num_bytes
    session.observe(text)
    assert session.num_bytes == size
    pairs = Counter(pairwise(text))
    for (context, token_id), count in contents(session.bigrams).items():
        assert 0 < count / session.unit <= pairs[context, token_id] * 1.001
    rows = session.bigrams.keys[session.bigrams.keys >= 0].tolist()
    assert len(set(rows)) == len(rows)


def test_a_strong_context_outlives_weak_ones() -> None:
    table = ContextTable(16, 2)
    for _ in range(10):
        table.add(7, 1, 1.0)
    for key in range(100, 400):
        table.add(key, 1, 1.0)
    assert contents(table)[7, 1] == 10.0
    assert (table.keys >= 0).sum() == 16


def test_a_strong_continuation_outlives_weak_ones() -> None:
    table = ContextTable(WAYS, 2)
    for _ in range(3):
        table.add(7, 1, 1.0)
    for token_id in range(10, 20):
        table.add(7, token_id, 1.0)
    assert contents(table) == {(7, 1): 3.0, (7, 19): 1.0}


@pytest.mark.parametrize("num_rows", [0, 4, 24])
def test_rows_are_a_power_of_two(num_rows: int) -> None:
    with pytest.raises(ValueError, match="power of 2"):
        ContextTable(num_rows, 2)


counts_of = st.dictionaries(
    st.tuples(st.one_of(st.integers(0, 40), st.integers(0, 2**62)), st.integers(0, 9)), st.integers(1, 99), max_size=80
)


@given(counts=counts_of, num_rows=st.sampled_from([8, 64]))
def test_filling_keeps_the_strongest_where_reads_find_them(counts: dict[tuple[int, int], int], num_rows: int) -> None:
    table = ContextTable(num_rows, 4)
    keys = np.array([key for key, _ in counts], np.int64)
    tokens = np.array([token_id for _, token_id in counts], np.int32)
    table.fill(Entries(keys, tokens, np.array(list(counts.values()), np.float32)))
    stored = contents(table)
    assert stored.items() <= counts.items()
    for key in set(keys.tolist()):
        row = table.find(key)
        own = sorted((count for (of, _), count in counts.items() if of == key), reverse=True)
        if row >= 0:
            assert table.counts[row].tolist() == [*own[:4], *[0] * (4 - len(own))]
        else:
            rivals = [other for other in set(keys.tolist()) if table.home(other) == table.home(key)]
            totals = {other: sum(c for (of, _), c in counts.items() if of == other) for other in rivals}
            assert sum(total >= totals[key] for total in totals.values()) > WAYS


@given(text=texts.filter(bool))
def test_snapshot_counts_restore(text: list[int]) -> None:
    session = SessionNgrams(VOCAB, AMPLE, half_life=50.0)
    session.observe(text)
    other = SessionNgrams(VOCAB, AMPLE, half_life=50.0)
    other.restore(session.strongest(LIMITS), session.num_tokens)
    assert other.num_tokens == len(text)
    for order in (1, 2, 3):
        for i in range(len(text) - order + 1):
            assert other.count(text[i : i + order]) == pytest.approx(session.count(text[i : i + order]), rel=1e-4)


def test_strongest_are_the_largest() -> None:
    session = SessionNgrams(VOCAB, AMPLE, half_life=NO_DECAY)
    session.observe([1, 2, 3] * 10 + [4, 5, 6])
    unigrams, bigrams, trigrams = session.strongest((3, 2, 2))
    assert sorted(unigrams.token_ids[:, 0].tolist()) == [1, 2, 3]
    assert sorted(map(tuple, bigrams.token_ids.tolist())) == [(1, 2), (2, 3)]
    assert len(trigrams.counts) == 2
    assert (1, 2, 3) in set(map(tuple, trigrams.token_ids.tolist()))


def test_lookup_gives_each_row_its_own_session() -> None:
    a, b = (SessionNgrams(VOCAB, SMALL, half_life=NO_DECAY) for _ in range(2))
    a.observe([1, 2, 3, 1, 2, 4])
    b.observe([9, 2, 5])
    bigrams, trigrams = lookup([a, b, a, a], [(1, 2), (1, 2), (-1, 2), (-1, -1)])
    assert [set(row) for row in bigrams.token_ids.tolist()] == [{3, 4}, {5, -1}, {3, 4}, {-1}]
    assert [set(row) for row in trigrams.token_ids.tolist()] == [{3, 4}, {-1}, {-1}, {-1}]
    assert bigrams.at(np.array([[3, 9, -1], [5, 3, -1]] * 2, np.int32)).tolist()[1] == pytest.approx([np.log(2), 0, 0])
