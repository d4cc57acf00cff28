"""What one running sequence knows: its tail of the draft vocabulary, its n-grams and the weights of its prior."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.messages import VocabularyCounts
from engine.vocab.core_set import CoreSet
from engine.vocab.ngrams import SessionNgrams
from engine.vocab.prior_weights import PriorWeights
from engine.vocab.replacement import Replacement, SlotWrite
from engine.vocab.text_matches import make_text_index

Source = Literal["snapshot", "tenant", "context", "target", "graph", "semantic"]
"""What named a token: the session's or the tenant's past, its own text, the target's top-k, an index."""
MAX_INSERTIONS = 32
"""Tokens that a verified step puts into a tail, at most (the paper's)."""
MAX_PROMPT_TOKENS = 4096
"""The last tokens of a prompt, which are looked at."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a sequence is; ``domain`` None: of no domain."""

    tenant: str
    domain: str | None


@dataclass(slots=True)
class _Counts:
    verified: int = 0
    covered: int = 0
    events: int = 0
    insertions: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)


class SessionVocab:
    """The live state of one sequence, from its first verified token to its last.

    Args:
        owner: whose it is.
        slab: which memory its tail has.
        core: what all sequences can draft.
        tail: the tokens that it can draft besides; None where there are no tails.
        ngrams: counts of the session so far.
        weights: of its prior.
        num_verified: tokens generated in the session before.
    """

    def __init__(
        self,
        owner: Owner,
        slab: int,
        core: CoreSet,
        tail: Replacement | None,
        ngrams: SessionNgrams,
        weights: PriorWeights,
        num_verified: int = 0,
    ) -> None:
        self.owner, self.slab = owner, slab
        self.tail, self.ngrams, self.weights, self.num_verified = tail, ngrams, weights, num_verified
        self.num_seen = 0
        """How many of the sequence's tokens were observed."""
        self.text = make_text_index()
        """All of them."""
        self._core, self._counts = core, _Counts()
        self._sources: dict[int, Source] = {}

    @property
    def room(self) -> int:
        """Free slots of the tail."""
        return 0 if self.tail is None else len(self.tail.token_ids) - len(self.tail)

    def outside(self, token_ids: Iterable[int]) -> list[int]:
        """Tokens that are not in the core."""
        return self._core.outside(token_ids)

    def insert(self, token_ids: Sequence[int], source: Source, limit: int) -> list[SlotWrite]:
        """Put tokens into the tail, the most wanted first.

        Args:
            token_ids: in the core or not.
            source: what named them.
            limit: most tokens that may be new to the tail; those beyond are left out.

        Returns:
            The slots whose rows must be written.
        """
        if self.tail is None:
            return []
        named: list[int] = []
        for token_id in dict.fromkeys(self._core.outside(token_ids)):
            limit -= token_id not in self.tail
            if limit < 0:
                break
            named.append(token_id)
        if not named:
            return []
        writes = self.tail.insert(named)
        for write in writes:
            self._sources[write.token_id] = source
        self._counts.insertions[source] += len(writes)
        if len(self._sources) > 2 * len(self.tail) + MAX_INSERTIONS:
            self._sources = {token_id: was for token_id, was in self._sources.items() if token_id in self.tail}
        return writes

    def observe_prompt(self, token_ids: Sequence[int]) -> None:
        """Count the n-grams of a prompt.

        Most of a conversation's prompt is its earlier turns, sent once more. So where the session has a past, triples
        that it knows are not counted again.
        """
        recent = token_ids[-MAX_PROMPT_TOKENS:]
        self.num_seen = len(token_ids)
        self.text.extend(token_ids)
        if not self.ngrams.num_tokens:
            self.ngrams.observe(recent)
            return
        new: set[tuple[int, int, int]] = set()
        begin = 2  # of a run of tokens whose triples are new: counted together, since a call costs more than a token
        triples = zip(recent, recent[1:], recent[2:], strict=False)
        for end, (triple, is_known) in enumerate(zip(triples, self.ngrams.knows(recent), strict=True), start=2):
            if is_known or triple in new:
                if begin < end:
                    self.ngrams.observe(recent[begin:end], recent[begin - 2 : begin])
                begin = end + 1
            else:
                new.add(triple)
        if begin < len(recent):
            self.ngrams.observe(recent[begin:], recent[begin - 2 : begin])

    def observe(self, token_ids: Sequence[int], num_accepted: int, before: Sequence[int]) -> list[int]:
        """Take the tokens of a step in which it was drafted; before anything is inserted because of them.

        Args:
            token_ids: in order.
            num_accepted: how many of them were drafted.
            before: the tokens right before them.

        Returns:
            Those that could not have been drafted.
        """
        missed = self.read(token_ids, before)
        if self.tail is not None:
            missed = [token_id for token_id in missed if token_id not in self.tail]
            self._count_hits(self._core.outside(token_ids[:num_accepted]))
        self._counts.verified += len(token_ids)
        self._counts.covered += len(token_ids) - len(missed)
        self._counts.events += bool(missed)
        return missed

    def read(self, token_ids: Sequence[int], before: Sequence[int]) -> list[int]:
        """Take verified tokens, drafted or not; before anything is inserted because of them.

        Returns:
            Those that are not in the core.
        """
        self.num_seen += len(token_ids)
        self.text.extend(token_ids)
        self.ngrams.observe(token_ids, before)
        self.num_verified += len(token_ids)
        outside = self._core.outside(token_ids)
        if self.tail is not None:
            self.tail.touch(outside)
        return outside

    def counts(self) -> VocabularyCounts:
        """How it fared so far."""
        return VocabularyCounts(
            tail_tokens=0 if self.tail is None else len(self.tail),
            verified_tokens=self._counts.verified,
            covered_tokens=self._counts.covered,
            events=self._counts.events,
            insertions=dict(self._counts.insertions),
            hits=dict(self._counts.hits),
        )

    def _count_hits(self, token_ids: Iterable[int]) -> None:
        self._counts.hits.update(self._sources[token_id] for token_id in token_ids if token_id in self._sources)
