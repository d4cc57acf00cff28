"""The draft vocabularies of all running sequences: who has one, and what happens to it when.

Nothing here can change an output: a vocabulary decides what is drafted, and the target decides what is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from engine.config import DynamicConfig
from engine.messages import SessionState, VocabularyCounts
from engine.request import Request
from engine.vocab.bigram_graph import BigramGraph
from engine.vocab.core_set import CoreSet
from engine.vocab.draft_prior import DraftPrior
from engine.vocab.drafted import DraftedTokens
from engine.vocab.ngrams import SessionNgrams
from engine.vocab.replacement import make_replacement
from engine.vocab.retrieval import Retrieval
from engine.vocab.semantic import SemanticIndex
from engine.vocab.semantic_search import SemanticSearch
from engine.vocab.session_past import make_session, pack_session
from engine.vocab.session_vocab import Owner, SessionVocab
from engine.vocab.snapshot import SessionSnapshot, SnapshotError, decode
from engine.vocab.tail_writer import TailMemory, TailWriter
from engine.vocab.tenant_graphs import TenantGraphs
from engine.vocab.tenant_memory import TenantMemory
from engine.vocab.verified import RowsTopK, VerifiedSequence

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Resources:
    """What the vocabularies of a model are made of.

    ``fingerprint`` of its tokens. ``tails``: memory for ``slots`` tokens of each of ``DynamicConfig.max_sessions``
    sequences, and one slab more, always empty, for the others; None where tails have no slots. ``graph`` and
    ``semantic``: the indices, if there are any. ``start_weights`` [NUM_FEATURES]: where the prior of a tenant's first
    session starts; None: at zeros.
    """

    core: CoreSet
    fingerprint: str
    tails: TailMemory | None = None
    slots: int = 0
    graph: BigramGraph | None = None
    semantic: SemanticIndex | None = None
    start_weights: Sequence[float] | None = None


class DraftVocab:
    """Gives running sequences a vocabulary each, as long as there is room, and keeps it in step with their text.

    One thread calls all methods. A sequence without a vocabulary drafts from the core, without a prior.

    Args:
        options: which parts are on.
        resources: what there is.
    """

    def __init__(self, options: DynamicConfig, resources: Resources) -> None:
        self._options, self._resources = options, resources
        self._free = list(range(options.max_sessions))[::-1]
        self._states: dict[str, SessionState | None] = {}
        """Of all requests that have arrived, with a vocabulary or not."""
        self._sessions: dict[str, SessionVocab] = {}
        self._memory = TenantMemory() if options.tenant_memory else None
        self._search = None if resources.semantic is None else SemanticSearch(resources.semantic)
        self._writer = TailWriter(resources.tails)
        graph = resources.graph if options.graph else None
        graphs = TenantGraphs(graph) if options.graph and resources.slots else None
        self._retrieval = Retrieval(options, resources.core, self._writer, self._memory, graphs, self._search)
        prior = None
        if options.prior != "off":
            prior = DraftPrior(options.prior == "learned", options.prior_order, graph, options.prior_matches)
        self.drafted = DraftedTokens(prior, self._sessions, wants_hidden=self._search is not None)
        """What the tokens that are being verified were chosen from, and the prior."""
        self.num_refused_snapshots = 0

    @property
    def has_tails(self) -> bool:
        """Whether sequences can have tokens of their own."""
        return self._resources.slots > 0

    @property
    def num_used(self) -> int:
        """Sequences with a vocabulary."""
        return len(self._sessions)

    @property
    def num_total(self) -> int:
        """Sequences that can have one at the same time."""
        return self._options.max_sessions

    @property
    def num_bytes(self) -> int:
        """Memory of the statistics of as many sequences as can have a vocabulary."""
        return self.num_total * SessionNgrams(self._resources.core.vocab_size).num_bytes

    @property
    def semantic_work(self) -> tuple[int, float]:
        """Searches in the semantic index so far, and the seconds they took."""
        return (0, 0.0) if self._search is None else (self._search.num_searches, self._search.seconds)

    def begin(self, request_id: str, state: SessionState | None) -> None:
        """A request arrives; ``state`` is what its session brings along."""
        self._states[request_id] = state

    def rehearse(self, requests: Sequence[Request]) -> None:
        """Made-up requests get vocabularies with full tails, to measure what those cost."""
        for request in requests:
            self.begin(request.request_id, None)
            self._start(request)
            if request.request_id in self._sessions:
                self._retrieval.fill(self._sessions[request.request_id])

    def slabs(self, requests: Sequence[Request]) -> list[int]:
        """The tail of each row to draft for; those of a step's first draft are brought up to date before."""
        for request in requests:
            if request.request_id not in self._sessions:
                self._start(request)
            vocab = self._sessions.get(request.request_id)
            if vocab is not None and not request.draft_token_ids:
                self.drafted.begin(request.request_id)
                self._catch_up(vocab, request)
        self._writer.flush()
        sessions = (self._sessions.get(request.request_id) for request in requests)
        return [self._options.max_sessions if vocab is None else vocab.slab for vocab in sessions]

    def observe(self, sequences: Sequence[VerifiedSequence], top_k: RowsTopK, later: Collection[str] = ()) -> None:
        """Follow a verified step. A sequence for which nothing was drafted is left for later: that is cheaper.

        Args:
            sequences: those that got tokens.
            top_k: called for rows where the target's own choices are wanted.
            later: requests whose first token does not bring them a vocabulary: they get one when they are drafted for.
        """
        self.drafted.learn(sequences)
        for sequence in sequences:
            request_id = sequence.request.request_id
            if request_id not in self._sessions:
                if request_id not in later and not sequence.request.output_token_ids:
                    self._start(sequence.request)
            elif not sequence.num_drafts:
                continue
            if request_id in self._sessions:
                self._follow(request_id, sequence, top_k)
        self._retrieval.take_neighbours(self._sessions)
        self._writer.flush()

    def bootstrap(self, request_id: str, likely: Sequence[NDArray[np.int32]]) -> None:
        """Fill free slots of a new tail with what the target thought likely at the prompt's last positions.

        Args:
            request_id: after its first ``observe``.
            likely: [k] of each position, best first; the last position last.
        """
        if likely and request_id in self._sessions:
            self._retrieval.bootstrap(self._sessions[request_id], np.stack(likely[::-1]))
            self._writer.flush()

    def finish(self, request: Request) -> tuple[bytes | None, VocabularyCounts | None]:
        """A request has ended, and its last tokens are committed: what its session keeps of it, and its counts."""
        if request.request_id not in self._sessions and self._states.get(request.request_id) is not None:
            self._start(request)  # nothing was drafted for it, but its session is to know of it
        vocab = self._sessions.get(request.request_id)
        if vocab is None:
            return None, None
        self._catch_up(vocab, request)
        if self._memory is not None and vocab.weights.num_lessons:
            weights = vocab.weights.learned.tolist()
            self._memory.end_session(vocab.owner.tenant, vocab.owner.domain, weights)
        snapshot = (
            None if self._states[request.request_id] is None else pack_session(vocab, self._resources.fingerprint)
        )
        return snapshot, vocab.counts()

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._states.pop(request_id, None)
        self.drafted.forget(request_id)
        vocab = self._sessions.pop(request_id, None)
        if vocab is not None:
            self._writer.clear(vocab.slab)
            self._free.append(vocab.slab)

    def _start(self, request: Request) -> None:
        """Make the vocabulary of a sequence whose prompt is computed, if there is room."""
        if not self._free or request.request_id not in self._states:
            return
        state = self._states[request.request_id]
        snapshot = self._read(state)
        owner = Owner(request.tenant, state.domain or None if state else None)
        known = None if self._memory is None else self._memory.weights(owner.tenant, owner.domain)
        weights = known or self._resources.start_weights
        slots = self._resources.slots
        tail = make_replacement(self._options.replacement, slots) if slots else None
        vocab = make_session(owner, self._free.pop(), self._resources.core, tail, snapshot, weights)
        self._sessions[request.request_id] = vocab
        self.drafted.begin(request.request_id)
        vocab.observe_prompt(request.all_token_ids)
        past = snapshot.tail_token_ids() if snapshot else []
        self._retrieval.start(vocab, request.all_token_ids, past)

    def _read(self, state: SessionState | None) -> SessionSnapshot | None:
        """The session's past, None if it has none that can be used."""
        if state is None or not state.snapshot:
            return None
        try:
            return decode(state.snapshot, self._resources.fingerprint, self._resources.core.vocab_size)
        except SnapshotError as error:
            self.num_refused_snapshots += 1
            log.warning("a session starts cold: its snapshot cannot be used", reason=str(error))
            return None

    def _follow(self, request_id: str, sequence: VerifiedSequence, top_k: RowsTopK) -> None:
        """Take a sequence's tokens, and put into its tail what is likely to come."""
        vocab, request = self._sessions[request_id], sequence.request
        self._catch_up(vocab, request)
        first, end = sequence.first_row, sequence.first_row + len(sequence.token_ids)
        before = request.all_token_ids[-2:]
        missed = vocab.observe(sequence.token_ids, sequence.num_accepted, before)
        self._retrieval.learn(vocab, sequence.token_ids, before)
        self._retrieval.follow(vocab, sequence.token_ids, missed, lambda: top_k(first, end))
        hidden = self.drafted.hidden(request_id)
        self.drafted.begin(request_id)  # the next ones may not come from here
        place = sequence.token_ids.index(missed[0]) if missed else len(hidden)
        if place < len(hidden):
            self._retrieval.ask_neighbours(request_id, hidden[place])

    def _catch_up(self, vocab: SessionVocab, request: Request) -> None:
        """Take committed tokens that were left for later."""
        seen = vocab.num_seen
        if seen < request.num_tokens:
            tokens, before = request.all_token_ids[seen:], request.all_token_ids[max(seen - 2, 0) : seen]
            vocab.read(tokens, before)
            self._retrieval.learn(vocab, tokens, before)
            self._retrieval.catch_up(vocab, tokens)
