"""From a session's snapshot to a running sequence's state, and back."""

from __future__ import annotations

from collections.abc import Sequence

from engine.vocab.core_set import CoreSet
from engine.vocab.ngrams import SessionNgrams
from engine.vocab.prior_weights import PriorWeights
from engine.vocab.replacement import Replacement
from engine.vocab.session_vocab import Owner, SessionVocab
from engine.vocab.snapshot import MAX_NGRAMS, SessionSnapshot, encode, make_snapshot


def make_session(
    owner: Owner,
    slab: int,
    core: CoreSet,
    tail: Replacement | None,
    snapshot: SessionSnapshot | None,
    weights: Sequence[float] | None,
) -> SessionVocab:
    """The state of a sequence that starts; its tail is still empty.

    Args:
        owner: whose it is.
        slab: which memory its tail has.
        core: what all sequences can draft.
        tail: an empty one; None where there are no tails.
        snapshot: what the session's last request has left; None if this is the first.
        weights: where the prior of a new session starts; None: at zeros.
    """
    ngrams = SessionNgrams(core.vocab_size)
    if snapshot is None:
        return SessionVocab(owner, slab, core, tail, ngrams, PriorWeights(weights))
    ngrams.restore(snapshot.ngram_counts(), snapshot.num_observed_tokens)
    prior = PriorWeights(snapshot.weights)
    return SessionVocab(owner, slab, core, tail, ngrams, prior, snapshot.num_verified_tokens)


def pack_session(vocab: SessionVocab, fingerprint: str) -> bytes:
    """What is kept of a sequence for its session's next request; ``fingerprint`` of the model's tokens."""
    snapshot = make_snapshot(
        vocabulary=fingerprint,
        num_verified_tokens=vocab.num_verified,
        num_observed_tokens=vocab.ngrams.num_tokens,
        weights=vocab.weights.learned.tolist(),
        tail=[] if vocab.tail is None else vocab.tail.contents(),
        ngrams=vocab.ngrams.strongest(MAX_NGRAMS),
    )
    return encode(snapshot)
