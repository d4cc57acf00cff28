"""The draft vocabularies of all running sequences: who has one, and what happens to it when.

Nothing here can change an output: a vocabulary decides what is drafted, and the target decides what is kept. What they
hold is in ``kernels.native_sessions``, which is called for whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.config import DynamicConfig
from engine.draft_vocab.drafted_tokens import DraftedTokens
from engine.draft_vocab.resources import Resources, session_options
from engine.draft_vocab.running_texts import RunningTexts
from engine.draft_vocab.session_past import SessionPast
from engine.draft_vocab.tenants import TenantTables
from engine.messages import SessionState, VocabularyCounts
from engine.request import Request
from engine.verification import Verification
from kernels.native_sessions import Sessions, TailWrites

if TYPE_CHECKING:
    from engine.draft_vocab.semantic import SemanticIndex, SemanticSearch

_NEW_BY_SEARCH = 32
"""Tokens that a search puts into a tail, at most."""
TopK = Callable[[Sequence[int]], NDArray[np.int32]]
"""The target's most likely tokens at some rows of a step's logits: [n, k], best first."""


@dataclass(slots=True)
class _Running:
    """A sequence with a vocabulary."""

    session: int
    tenant: str
    num_seen: int = 0
    """How many of its tokens its session has read."""


@dataclass(slots=True)
class _Rows:
    """Arguments of a call for several sequences."""

    running: list[_Running] = field(default_factory=list)
    tokens: list[Sequence[int]] = field(default_factory=list)

    def add(self, running: _Running, tokens: Sequence[int]) -> None:
        self.running.append(running)
        self.tokens.append(tokens)
        running.num_seen += len(tokens)


class DraftVocab:
    """Gives running sequences a vocabulary each, as long as there is room, and keeps it in step with their text.

    One thread calls all methods. A sequence without a vocabulary drafts from the core, without a prior.

    Args:
        options: which parts are on.
        resources: what there is.
        texts: of the running sequences.
    """

    def __init__(self, options: DynamicConfig, resources: Resources, texts: RunningTexts) -> None:
        self._options, self._resources, self.texts = options, resources, texts
        graph = resources.graph if options.graph else None
        of_sessions = session_options(options, resources.slots)
        self.sessions = Sessions(of_sessions, resources.core, None if graph is None else graph.arrays())
        self.drafted = DraftedTokens(self.sessions, texts, wants_hidden=resources.semantic is not None)
        self._uses_prior = options.prior != "off"
        self._free = list(range(options.max_sessions))[::-1]
        self._states: dict[str, SessionState | None] = {}
        """Of all requests that have arrived, with a vocabulary or not."""
        self._running: dict[str, _Running] = {}
        self._tenants = TenantTables(self.sessions) if of_sessions.num_tenants else None
        self._past = SessionPast(options, resources, self.sessions)
        self._search = _start_search(resources.semantic)

    @property
    def has_tails(self) -> bool:
        """Whether sequences can have tokens of their own."""
        return self._resources.slots > 0

    @property
    def uses_prior(self) -> bool:
        """Whether sequences have a prior."""
        return self._uses_prior

    @property
    def num_used(self) -> int:
        """Sequences with a vocabulary."""
        return len(self._running)

    @property
    def num_total(self) -> int:
        """Sequences that can have one at the same time."""
        return self._options.max_sessions

    @property
    def num_refused_snapshots(self) -> int:
        """Snapshots that could not be used."""
        return self._past.num_refused_snapshots

    @property
    def num_bytes(self) -> int:
        """Memory of what as many sequences know as can have a vocabulary."""
        return self.num_total * (self.sessions.num_bytes + self.texts.texts.num_bytes)

    @property
    def semantic_work(self) -> tuple[int, float]:
        """Searches in the semantic index so far, and the seconds they took."""
        return (0, 0.0) if self._search is None else (self._search.num_searches, self._search.seconds)

    def begin(self, request_id: str, state: SessionState | None) -> None:
        """A request arrives; ``state`` is what its session brings along."""
        self._states[request_id] = state

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Made-up requests get vocabularies with full tails, to measure what those cost."""
        for request in requests:
            self.begin(request.request_id, None)
            self._start(request)
            running = self._running.get(request.request_id)
            if running is not None:
                self._write(self.sessions.insert(running.session, range(self.sessions.vocab_size), "tenant"))

    def before_drafts(self, requests: Sequence[Request]) -> list[int]:
        """Bring sequences up to date that are about to be drafted for; the session of each, -1 for none."""
        self.drafted.begin()
        behind = _Rows()
        found = []
        for request in requests:
            running = self._running.get(request.request_id) or self._start(request)
            if running is not None and running.num_seen < request.num_tokens:
                behind.add(running, request.all_token_ids[running.num_seen :])
            found.append(-1 if running is None else running.session)
        self._catch_up(behind)
        if self._uses_prior and self._options.prior_matches:
            self.texts.read(requests)
        return found

    def sessions_of(self, requests: Sequence[Request]) -> list[int]:
        """The session of each sequence, -1 for none."""
        found = (self._running.get(request.request_id) for request in requests)
        return [-1 if running is None else running.session for running in found]

    def slabs(self, sessions: Sequence[int]) -> list[int]:
        """The tails of sessions; of those that are none (-1) one that is always empty."""
        return [self._options.max_sessions if session < 0 else session for session in sessions]

    def follow(self, verified: Sequence[Verification], top_k: TopK, later: Collection[str] = ()) -> None:
        """Follow a verified step. A sequence for which nothing was drafted is left for later: that is cheaper.

        Args:
            verified: the sequences that got tokens.
            top_k: called for rows where the target's own choices are wanted.
            later: requests whose first token does not bring them a vocabulary: they get one when they are drafted for.
        """
        followed: list[Verification] = []
        rows, behind = _Rows(), _Rows()
        for one in verified:
            request = one.request
            running = self._running.get(request.request_id)
            if running is None and request.request_id not in later and not request.output_token_ids:
                running = self._start(request)
            elif running is None or one.source != "draft":
                continue
            if running is not None:
                if running.num_seen < request.num_tokens:  # somebody else drafted
                    behind.add(running, request.all_token_ids[running.num_seen :])
                rows.add(running, one.kept)
                followed.append(one)
        self._catch_up(behind)
        if followed:
            self._follow(followed, rows, top_k)
        self.drafted.begin()  # the next ones may not come from here
        for request_id, token_ids in self._search.take() if self._search is not None else ():
            if request_id in self._running:
                session = self._running[request_id].session
                self._write(self.sessions.insert(session, token_ids, "semantic", _NEW_BY_SEARCH))

    def _follow(self, verified: Sequence[Verification], rows: _Rows, top_k: TopK) -> None:
        """Take tokens of sequences that are up to date, and put into their tails what is likely to come."""
        sessions, tenants = [one.session for one in rows.running], self._tables(rows.running)
        num_accepted = [one.num_accepted for one in verified]
        places = [
            self.drafted.places(one.request.request_id, min(len(one.kept), one.sequence.num_draft_tokens))
            for one in verified
        ]
        writes, missed = self.sessions.verify(
            sessions, tenants, rows.tokens, num_accepted, places, self.drafted.arrays()
        )
        self._write(writes)
        signal = self._options.target_signal
        chosen = range(len(verified)) if signal == "every" else [row for row, first in enumerate(missed) if first >= 0]
        if not chosen or not self.has_tails:
            return
        likely = None
        if signal != "off":
            likely = top_k([place for row in chosen for place in verified[row].rows])
        of_chosen = None if tenants is None else [tenants[row] for row in chosen]
        tokens = [rows.tokens[row] for row in chosen]
        self._write(self.sessions.retrieve([sessions[row] for row in chosen], of_chosen, tokens, likely))
        if self._search is not None:
            for row in chosen:
                self._ask(verified[row].request.request_id, missed[row])

    def _ask(self, request_id: str, missed: int) -> None:
        """Search for the tokens nearest to the state from which a token should have been drafted, but could not."""
        hidden = self.drafted.hidden(request_id)
        if self._search is not None and 0 <= missed < len(hidden):
            self._search.ask(request_id, hidden[missed])

    def bootstrap(self, request_id: str, likely: NDArray[np.int32]) -> None:
        """Fill free slots of a new tail with what the target thought likely at the prompt's last positions.

        Args:
            request_id: after its first ``follow``.
            likely: [n, k], best first; the last position last.
        """
        running = self._running.get(request_id)
        if running is not None:
            self._write(self.sessions.insert(running.session, likely[::-1].T.ravel().tolist(), "target"))

    def finish(self, request: Request) -> tuple[bytes | None, VocabularyCounts | None]:
        """A request has ended, and its last tokens are committed: what its session keeps of it, and its counts."""
        state = self._states.get(request.request_id)
        running = self._running.get(request.request_id)
        if running is None and state is not None:
            running = self._start(request)  # nothing was drafted for it, but its session is to know of it
        if running is None:
            return None, None
        if running.num_seen < request.num_tokens:
            behind = _Rows()
            behind.add(running, request.all_token_ids[running.num_seen :])
            self._catch_up(behind)
        self._past.remember(running.session, request)
        counts = self.sessions.counts(running.session)
        fared = VocabularyCounts(
            tail_tokens=len(self.sessions.tail(running.session)),
            verified_tokens=counts.verified,
            covered_tokens=counts.covered,
            events=counts.events,
            insertions=counts.insertions,
            hits=counts.hits,
        )
        return None if state is None else self._past.pack(running.session), fared

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._states.pop(request_id, None)
        self.texts.forget(request_id)
        running = self._running.pop(request_id, None)
        if running is not None:
            if self._resources.tails is not None:
                self._resources.tails.clear(running.session)
            self._free.append(running.session)

    def prior_weights(self, request_id: str) -> NDArray[np.float32] | None:
        """[NUM_FEATURES] with which a sequence is drafted for; None: without a prior."""
        running = self._running.get(request_id)
        return None if running is None or not self._uses_prior else self.sessions.applied_weights(running.session)

    def _start(self, request: Request) -> _Running | None:
        """Make the vocabulary of a sequence whose prompt is computed, if there is room."""
        if not self._free or request.request_id not in self._states:
            return None
        running = _Running(self._free.pop(), request.tenant)
        self._running[request.request_id] = running
        past, of_tenant = self._past.begin(running.session, request, self._states[request.request_id])
        tokens = request.all_token_ids
        self._write(self.sessions.begin(running.session, tokens, past, of_tenant))
        running.num_seen = len(tokens)
        return running

    def _catch_up(self, rows: _Rows) -> None:
        if rows.running:
            sessions = [one.session for one in rows.running]
            self._write(self.sessions.catch_up(sessions, self._tables(rows.running), rows.tokens))

    def _tables(self, running: Sequence[_Running]) -> list[int] | None:
        return None if self._tenants is None else [self._tenants.of(one.tenant) for one in running]

    def _write(self, writes: TailWrites) -> None:
        if len(writes) and self._resources.tails is not None:
            self._resources.tails.write(*writes.T.tolist())


def _start_search(index: SemanticIndex | None) -> SemanticSearch | None:
    if index is None:
        return None
    from engine.draft_vocab.semantic import SemanticSearch

    return SemanticSearch(index)
