"""Small snapshots, for tests of what the server does with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from evospec.engine.draft_vocab.ngram_counts import NgramCounts
from evospec.engine.draft_vocab.snapshot import decode, encode, make_snapshot
from evospec.kernels.session_options import NUM_FEATURES
from tests.tiny_models import VOCAB_SIZE, VOCABULARY


def snapshot_of(
    token_ids: Iterable[int] = (), counts: Mapping[int, float] | None = None, vocabulary: str = VOCABULARY
) -> bytes:
    """A snapshot whose tail is ``token_ids``, with ``counts`` of single tokens."""
    counts = counts or {}
    unigrams = NgramCounts(np.array(list(counts), np.int32).reshape(-1, 1), np.array(list(counts.values()), np.float32))
    none = [NgramCounts(np.empty((0, order), np.int32), np.empty(0, np.float32)) for order in (2, 3)]
    return encode(make_snapshot(vocabulary, 0, 0, [0.0] * NUM_FEATURES, sorted(set(token_ids)), [unigrams, *none]))


def tokens_of(snapshot: bytes) -> set[int]:
    """The tail; of no snapshot, the empty set."""
    return set(decode(snapshot, VOCABULARY, VOCAB_SIZE).tail_token_ids()) if snapshot else set()


def counts_of(snapshot: bytes) -> dict[int, float]:
    """The counts of single tokens."""
    unigrams = decode(snapshot, VOCABULARY, VOCAB_SIZE).ngram_counts()[0]
    return dict(zip(unigrams.token_ids[:, 0].tolist(), unigrams.counts.tolist(), strict=True))
