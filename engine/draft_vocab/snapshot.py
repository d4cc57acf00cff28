"""A session's vocabulary between two requests: what the engine hands back, the server stores and sends again.

It holds token statistics of people's text, and the last answers, so it is small, bounded and never logged. What comes
back from the store is checked in full before use.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from evospec.engine.config import MAX_TAIL_TOKENS
from evospec.engine.draft_vocab.ngram_counts import NgramCounts
from evospec.kernels.session_options import HALF_LIFE, MAX_WEIGHT, NUM_FEATURES

FORMAT = 2
MAX_BYTES = 72 * 1024
MAX_NGRAMS = (1024, 2048, 2048)
"""Of orders 1, 2, 3. With a full tail these come to 62 KiB."""
MAX_SAID = 2048
"""Tokens of answers."""
MAX_FINGERPRINT = 64
_MAX_COUNT = 60000.0
_MAX_TOKENS = 1 << 53
_ID = np.dtype("<u4")
_COUNT = np.dtype("<f2")


class SnapshotError(ValueError):
    """Bytes that are no usable snapshot: damaged, of another format, or of another model's vocabulary."""


class PackedNgrams(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``NgramCounts`` as bytes: ``token_ids`` [n, order] uint32 and ``counts`` [n] float16, little-endian."""

    token_ids: bytes
    counts: bytes


class SessionSnapshot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Made by ``make_snapshot`` or ``decode``; so within all bounds."""

    format: int
    vocabulary: str
    """Fingerprint of the model's vocabulary."""
    num_verified_tokens: int
    """Generated in the session so far."""
    num_observed_tokens: int
    """Counted in the n-grams so far, prompts included: the clock by which counts decay."""
    weights: list[float]
    """[NUM_FEATURES]: the prior's."""
    tail: bytes
    """[n] uint32, the token most worth keeping first."""
    ngrams: list[PackedNgrams]
    """Of orders 1, 2, 3."""
    said: bytes
    """[n] uint32: the last answers, each behind the end of its prompt."""

    def tail_token_ids(self) -> list[int]:
        """The tail, the token most worth keeping first."""
        token_ids: list[int] = np.frombuffer(self.tail, _ID).tolist()
        return token_ids

    def said_token_ids(self) -> list[int]:
        """The last answers, each behind the end of its prompt."""
        token_ids: list[int] = np.frombuffer(self.said, _ID).tolist()
        return token_ids

    def ngram_counts(self) -> list[NgramCounts]:
        """For ``ngram_counts.restore``."""
        return [
            NgramCounts(
                np.frombuffer(packed.token_ids, _ID).astype(np.int32).reshape(-1, order),
                np.frombuffer(packed.counts, _COUNT).astype(np.float32),
            )
            for order, packed in enumerate(self.ngrams, start=1)
        ]


def make_snapshot(
    vocabulary: str,
    num_verified_tokens: int,
    num_observed_tokens: int,
    weights: Sequence[float],
    tail: Sequence[int],
    ngrams: Sequence[NgramCounts],
    said: Sequence[int] = (),
) -> SessionSnapshot:
    """Pack a session's state, the strongest of what is more than fits, and the last tokens of ``said``.

    Arguments are the fields of ``SessionSnapshot``: a fingerprint has at most ``MAX_FINGERPRINT`` characters of ASCII,
    no token is in the tail twice, and no n-gram comes twice.
    """
    return SessionSnapshot(
        format=FORMAT,
        vocabulary=vocabulary,
        num_verified_tokens=num_verified_tokens,
        num_observed_tokens=num_observed_tokens,
        weights=[min(max(float(weight), 0.0), MAX_WEIGHT) for weight in weights],
        tail=np.asarray(tail[:MAX_TAIL_TOKENS], _ID).tobytes(),
        ngrams=[_pack(counts, limit) for counts, limit in zip(ngrams, MAX_NGRAMS, strict=True)],
        said=np.asarray(said[-MAX_SAID:], _ID).tobytes(),
    )


def encode(snapshot: SessionSnapshot) -> bytes:
    """MessagePack, at most ``MAX_BYTES``."""
    return msgspec.msgpack.encode(snapshot)


def decode(data: bytes, vocabulary: str, vocab_size: int) -> SessionSnapshot:
    """Read and check what ``encode`` wrote.

    Args:
        data: as stored; anything at all.
        vocabulary: fingerprint of the model that will use it.
        vocab_size: its token ids are below.

    Raises:
        SnapshotError: it must not be used. The message holds nothing of the content.
    """
    if len(data) > MAX_BYTES:
        raise SnapshotError(f"{len(data)} bytes, at most {MAX_BYTES} are allowed")
    try:
        snapshot = msgspec.msgpack.decode(data, type=SessionSnapshot)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotError("not a snapshot") from error
    if snapshot.format != FORMAT:
        raise SnapshotError(f"format {snapshot.format}, wanted {FORMAT}")
    if snapshot.vocabulary != vocabulary:
        raise SnapshotError("made with another vocabulary")
    _check(0 <= snapshot.num_verified_tokens <= _MAX_TOKENS, "number of verified tokens")
    _check(0 <= snapshot.num_observed_tokens <= _MAX_TOKENS, "number of observed tokens")
    _check(len(snapshot.weights) == NUM_FEATURES, "number of weights")
    _check(all(0.0 <= weight <= MAX_WEIGHT for weight in snapshot.weights), "weights")  # false for NaN
    _check_ids(snapshot.tail, 1, MAX_TAIL_TOKENS, vocab_size, "tail")
    _check(len(snapshot.ngrams) == len(MAX_NGRAMS), "orders of n-grams")
    for order, (packed, limit) in enumerate(zip(snapshot.ngrams, MAX_NGRAMS, strict=True), start=1):
        _check_ids(packed.token_ids, order, limit, vocab_size, f"{order}-grams")
        _check(len(packed.counts) * order * _ID.itemsize == len(packed.token_ids) * _COUNT.itemsize, "number of counts")
        counts = np.frombuffer(packed.counts, _COUNT)
        _check(bool(((counts > 0) & (counts <= _MAX_COUNT)).all()), "counts")
    _check(len(snapshot.said) % _ID.itemsize == 0 and len(snapshot.said) <= MAX_SAID * _ID.itemsize, "size of answers")
    _check(bool((np.frombuffer(snapshot.said, _ID) < vocab_size).all()), "token id in answers")
    return snapshot


def _check(sound: bool, what: str) -> None:
    if not sound:
        raise SnapshotError(f"bad {what}")


def _check_ids(data: bytes, order: int, limit: int, vocab_size: int, what: str) -> None:
    """Whole n-grams, not too many, of known tokens, none twice."""
    size = order * _ID.itemsize
    _check(len(data) % size == 0 and len(data) // size <= limit, f"size of {what}")
    _check(bool((np.frombuffer(data, _ID) < vocab_size).all()), f"token id in {what}")
    ngrams = np.frombuffer(data, np.dtype((np.void, size)))
    _check(len(set(ngrams.tolist())) == len(ngrams), f"repeated {what}")


def _pack(ngrams: NgramCounts, limit: int) -> PackedNgrams:
    """The ``limit`` largest counts, the largest first; equals by token ids: the order given is no matter."""
    counts = np.minimum(ngrams.counts, _MAX_COUNT).astype(_COUNT)
    descending = ~counts.view(np.uint16)  # of numbers from 0 on, which have the order of their bits
    order = np.lexsort((*ngrams.token_ids.T[::-1], descending))[:limit]
    order = order[counts[order] > 0]
    return PackedNgrams(ngrams.token_ids[order].astype(_ID).tobytes(), counts[order].tobytes())


def merge(a: SessionSnapshot, b: SessionSnapshot, base: SessionSnapshot | None = None) -> SessionSnapshot:
    """Both requests' news on top of what they started from; ``merge(a, b, base) == merge(b, a, base)``.

    Counts: those of the base, decayed by the longer request, and what either has above them. Tails: the union, by the
    better of the two ranks. Weights: the mean, by the number of tokens each has verified. Answers: those of the request
    that has verified more.

    Args:
        a: one request's snapshot.
        b: the other's; of the same vocabulary.
        base: what both started from; None if they started cold.
    """
    base_verified, base_observed = (base.num_verified_tokens, base.num_observed_tokens) if base else (0, 0)
    verified = [max(side.num_verified_tokens - base_verified, 0) for side in (a, b)]
    observed = [max(side.num_observed_tokens - base_observed, 0) for side in (a, b)]
    decays = [2.0 ** (-tokens / HALF_LIFE) for tokens in observed]
    counts = a.ngram_counts(), b.ngram_counts()
    of_base = base.ngram_counts() if base else [NgramCounts(one.token_ids[:0], one.counts[:0]) for one in counts[0]]
    return make_snapshot(
        vocabulary=a.vocabulary,
        num_verified_tokens=base_verified + sum(verified),
        num_observed_tokens=base_observed + sum(observed),
        weights=_mean_weights(a.weights, b.weights, verified),
        tail=_merge_tails(a.tail_token_ids(), b.tail_token_ids()),
        ngrams=[_merge_counts(*of_order, decays) for of_order in zip(*counts, of_base, strict=True)],
        said=max((a, b), key=lambda side: (side.num_verified_tokens, side.said)).said_token_ids(),
    )


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
    # By example, without decay: x was counted 2 times in the base, 4 in a and 3 in b, and y once in a.
    #   of_a      4  1
    #   of_b      3  0
    #   of_base   2  0
    #   merged    5  1      2 + (4 - 2) + (3 - 2); 0 + (1 - 0) + (0 - 0)
    sides = a, b, base
    ngrams, columns = _distinct(np.concatenate([side.token_ids for side in sides]))
    counts = np.zeros((3, len(ngrams)), np.float32)
    of_sides = np.split(columns, np.cumsum([len(a.counts), len(b.counts)]))
    for row, of_side, side in zip(counts, of_sides, sides, strict=True):
        row[of_side] = side.counts
    of_a, of_b, of_base = counts
    news_a, news_b = (
        np.maximum(row - of_base * np.float32(decay), 0.0) for row, decay in zip((of_a, of_b), decays, strict=True)
    )
    return NgramCounts(ngrams, of_base * np.float32(min(decays)) + (news_a + news_b))


def _distinct(token_ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """[n, order] → the distinct rows, and [n] which of them each row is; ``np.unique`` of rows is slower."""
    labels = token_ids[:, 0].astype(np.int64)
    for column in token_ids.T[1:]:
        labels = np.unique(labels, return_inverse=True)[1] << 31 | column
    _, first, places = np.unique(labels, return_index=True, return_inverse=True)
    return token_ids[first], places
