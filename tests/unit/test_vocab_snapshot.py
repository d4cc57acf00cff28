"""Snapshots: whole after a round trip, bounded, refused when anything is wrong; two of one session merge."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.config import MAX_TAIL_TOKENS
from evospec.engine.draft_vocab.ngram_counts import NgramCounts
from evospec.engine.draft_vocab.snapshot import (
    MAX_BYTES,
    MAX_FINGERPRINT,
    MAX_NGRAMS,
    MAX_SAID,
    PackedNgrams,
    SessionSnapshot,
    SnapshotError,
    decode,
    encode,
    make_snapshot,
    merge,
)
from evospec.kernels.session_options import NUM_FEATURES
from tests.counted_session import CountedSession

VOCAB = 50
PRINT = "qwen2-tokens"


def snapshot_of(
    text: list[int], tail: list[int], weights: list[float] | None = None, before: SessionSnapshot | None = None
) -> SessionSnapshot:
    """What a request that generated ``text`` leaves behind, after the session's earlier ones."""
    ngrams = CountedSession(VOCAB)
    if before:
        ngrams.restore(before.ngram_counts(), before.num_observed_tokens)
    ngrams.observe(text)
    verified = len(text) + (before.num_verified_tokens if before else 0)
    return make_snapshot(
        PRINT, verified, ngrams.num_tokens, weights or [0.0] * NUM_FEATURES, tail, ngrams.strongest(MAX_NGRAMS), text
    )


texts = st.lists(st.integers(0, VOCAB - 1), max_size=40)
tails = st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=20)
weight_lists = st.lists(st.floats(0, 10), min_size=NUM_FEATURES, max_size=NUM_FEATURES)
snapshots = st.builds(snapshot_of, texts, tails, weight_lists)


def counts_of(snapshot: SessionSnapshot) -> dict[tuple[int, ...], float]:
    return {
        tuple(ngram): count
        for counts in snapshot.ngram_counts()
        for ngram, count in zip(counts.token_ids.tolist(), counts.counts.tolist(), strict=True)
    }


@given(text=texts, tail=tails, weights=weight_lists)
def test_a_round_trip_changes_nothing(text: list[int], tail: list[int], weights: list[float]) -> None:
    snapshot = snapshot_of(text, tail, weights)
    restored = decode(encode(snapshot), PRINT, VOCAB)
    assert restored == snapshot
    assert restored.tail_token_ids() == tail
    assert restored.said_token_ids() == text
    ngrams = CountedSession(VOCAB)
    ngrams.restore(restored.ngram_counts(), restored.num_observed_tokens)
    for order in (1, 2, 3):
        for i in range(len(text) - order + 1):
            assert ngrams.count(text[i : i + order]) == pytest.approx(text_count(text, order, i), rel=0.02)


def text_count(text: list[int], order: int, place: int) -> int:
    windows = [text[i : i + order] for i in range(len(text) - order + 1)]
    return windows.count(text[place : place + order])


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), unique=True), st.data())
def test_ngrams_are_packed_by_counts_and_of_equals_by_tokens(found: list[tuple[int, ...]], data: st.DataObject) -> None:
    counts = np.array([data.draw(st.sampled_from([0.0, 1e-9, 0.05, 1.0, 1.0001, 7.0, 1e9])) for _ in found], np.float32)
    none = [NgramCounts(np.empty((0, order), np.int32), np.empty(0, np.float32)) for order in (1, 2)]
    triples = NgramCounts(np.array(found, np.int32).reshape(-1, 3), counts)
    packed = make_snapshot("v", 0, 0, [0.0] * NUM_FEATURES, [], [*none, triples]).ngram_counts()[2]
    kept = np.minimum(counts, 60000.0).astype(np.float16).tolist()
    expected = sorted((-count, *ngram) for ngram, count in zip(found, kept, strict=True) if count > 0)
    assert [(-c, *ids) for c, ids in zip(packed.counts.tolist(), packed.token_ids.tolist(), strict=True)] == expected


def test_the_largest_snapshot_fits() -> None:
    vocab_size = 2**31
    rng = np.random.default_rng(0)

    def many(order: int, limit: int) -> NgramCounts:
        token_ids = rng.integers(2**30, vocab_size, (2 * limit, order)).astype(np.int32)
        return NgramCounts(token_ids, rng.random(2 * limit).astype(np.float32) * 1e6 + 1)

    ngrams = [many(order, limit) for order, limit in enumerate(MAX_NGRAMS, start=1)]
    tail = [vocab_size - 1 - i for i in range(2 * MAX_TAIL_TOKENS)]
    said = rng.integers(2**30, vocab_size, 2 * MAX_SAID).tolist()
    snapshot = make_snapshot("f" * MAX_FINGERPRINT, 2**53, 2**53, [1 / 3] * NUM_FEATURES, tail, ngrams, said)
    data = encode(snapshot)
    assert len(data) <= MAX_BYTES
    restored = decode(data, "f" * MAX_FINGERPRINT, vocab_size)
    assert restored.tail_token_ids() == tail[:MAX_TAIL_TOKENS]
    assert restored.said_token_ids() == said[-MAX_SAID:]
    assert [len(counts.counts) for counts in restored.ngram_counts()] == list(MAX_NGRAMS)
    kept = restored.ngram_counts()[1].counts
    assert kept.min() >= np.sort(np.minimum(ngrams[1].counts, 60000))[MAX_NGRAMS[1]] * 0.999


@settings(max_examples=300)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_snapshot_or_an_error(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        decode(data, PRINT, VOCAB)


@settings(max_examples=500)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_snapshot_is_an_error_or_within_bounds(place: int, value: int, cut: bool) -> None:
    data = bytearray(encode(snapshot_of([1, 2, 3, 1, 2, 4] * 3, [5, 6, 7], [0.5] * NUM_FEATURES)))
    place %= len(data)
    data[place] = value
    try:
        snapshot = decode(bytes(data[:place] if cut else data), PRINT, VOCAB)
    except SnapshotError:
        return
    assert all(0 <= token_id < VOCAB for token_id in snapshot.tail_token_ids())
    assert all(0 <= token_id < VOCAB for token_id in snapshot.said_token_ids())
    assert np.isfinite(snapshot.weights).all()
    ngrams = CountedSession(VOCAB)
    ngrams.restore(snapshot.ngram_counts(), snapshot.num_observed_tokens)
    assert np.isfinite(ngrams.sessions.table(0, 2).counts).all()


@pytest.mark.parametrize("data", [b"", b"\x91" * 60_000, b"\x00" * (MAX_BYTES + 1), b"\x97\x01\xa2\xff\xfe"])
def test_hostile_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        decode(data, PRINT, VOCAB)


NAN = float("nan")
GOOD = snapshot_of([1, 2, 3, 1, 2, 4], [5, 6, 7])
UINT = np.dtype("<u4")


def packed(order: int, token_ids: list[int], counts: list[float]) -> list[PackedNgrams]:
    ngrams = list(GOOD.ngrams)
    ngrams[order - 1] = PackedNgrams(np.array(token_ids, UINT).tobytes(), np.array(counts, "<f2").tobytes())
    return ngrams


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1, wanted 2"),
        ({"vocabulary": "other"}, "another vocabulary"),
        ({"num_verified_tokens": -1}, "verified"),
        ({"num_observed_tokens": 2**60}, "observed"),
        ({"weights": [0.0] * 3}, "number of weights"),
        ({"weights": [0.0, 0.0, 0.0, 0.0, NAN]}, "bad weights"),
        ({"weights": [0.0, 0.0, 0.0, 0.0, float("inf")]}, "bad weights"),
        ({"weights": [0.0, 0.0, 0.0, 0.0, -1.0]}, "bad weights"),
        ({"tail": b"\x01"}, "size of tail"),
        ({"tail": np.array([VOCAB], UINT).tobytes()}, "token id in tail"),
        ({"tail": np.array([3, 4, 3], UINT).tobytes()}, "repeated tail"),
        ({"tail": np.arange(MAX_TAIL_TOKENS + 1, dtype=UINT).tobytes()}, "size of tail"),
        ({"ngrams": GOOD.ngrams[:2]}, "orders"),
        ({"ngrams": packed(2, [1, 2, 3], [1.0])}, "size of 2-grams"),
        ({"ngrams": packed(2, [1, VOCAB], [1.0])}, "token id in 2-grams"),
        ({"ngrams": packed(2, [1, 2, 1, 2], [1.0, 1.0])}, "repeated 2-grams"),
        ({"ngrams": packed(3, [1, 2, 3], [1.0, 2.0])}, "number of counts"),
        ({"ngrams": packed(3, [1, 2, 3], [NAN])}, "bad counts"),
        ({"ngrams": packed(3, [1, 2, 3], [np.inf])}, "bad counts"),
        ({"ngrams": packed(1, [1], [0.0])}, "bad counts"),
        ({"said": b"\x01"}, "size of answers"),
        ({"said": np.zeros(MAX_SAID + 1, UINT).tobytes()}, "size of answers"),
        ({"said": np.array([VOCAB], UINT).tobytes()}, "token id in answers"),
    ],
)
def test_each_kind_of_damage_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        decode(encode(msgspec.structs.replace(GOOD, **changes)), PRINT, VOCAB)


@given(base=st.none() | snapshots, a=texts, b=texts, tails=st.tuples(tails, tails), weights=weight_lists)
def test_merging_is_commutative_and_stays_a_snapshot(
    base: SessionSnapshot | None, a: list[int], b: list[int], tails: tuple[list[int], list[int]], weights: list[float]
) -> None:
    left, right = snapshot_of(a, tails[0], weights, base), snapshot_of(b, tails[1], [1.0] * NUM_FEATURES, base)
    merged = merge(left, right, base)
    assert merged == merge(right, left, base)
    assert decode(encode(merged), PRINT, VOCAB) == merged
    assert set(merged.tail_token_ids()) == set(tails[0]) | set(tails[1])
    assert merged.said_token_ids() in (left.said_token_ids(), right.said_token_ids())
    assert merged.num_verified_tokens == len(a) + len(b) + (base.num_verified_tokens if base else 0)


@given(base=st.none() | snapshots, a=texts, b=texts)
def test_merged_counts_are_the_bases_and_what_each_added(
    base: SessionSnapshot | None, a: list[int], b: list[int]
) -> None:
    merged = counts_of(merge(snapshot_of(a, [], before=base), snapshot_of(b, [], before=base), base))
    parts = [counts_of(snapshot_of(a, [])), counts_of(snapshot_of(b, [])), counts_of(base) if base else {}]
    for ngram in {ngram for part in parts for ngram in part}:
        assert merged[ngram] == pytest.approx(sum(part.get(ngram, 0.0) for part in parts), rel=0.03)


@given(base=snapshots, text=texts, tail=tails)
def test_a_request_without_news_changes_little(base: SessionSnapshot, text: list[int], tail: list[int]) -> None:
    newer = snapshot_of(text, tail, [2.0] * NUM_FEATURES, before=base)
    merged = merge(newer, base, base)
    assert merged.num_observed_tokens == newer.num_observed_tokens
    assert counts_of(merged) == pytest.approx(counts_of(newer), rel=0.01)
    if text:
        assert merged.weights == newer.weights


def test_the_longer_request_has_more_say_in_the_weights() -> None:
    merged = merge(snapshot_of([1] * 30, [], [1.0] * NUM_FEATURES), snapshot_of([2] * 10, [], [3.0] * NUM_FEATURES))
    assert merged.weights == pytest.approx([1.5] * NUM_FEATURES)


def test_tails_are_merged_by_rank() -> None:
    assert merge(snapshot_of([], [1, 2, 3]), snapshot_of([], [4, 3, 5])).tail_token_ids() == [1, 4, 3, 2, 5]
