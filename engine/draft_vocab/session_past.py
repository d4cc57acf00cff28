"""What a session starts with, and what it leaves behind: its own snapshot, and what its tenant has in common."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from engine.config import DynamicConfig
from engine.draft_vocab.ngram_counts import restore, strongest
from engine.draft_vocab.prior import LIGHT_DRAFT_WEIGHTS
from engine.draft_vocab.resources import Resources
from engine.draft_vocab.snapshot import MAX_NGRAMS, SessionSnapshot, SnapshotError, decode, encode, make_snapshot
from engine.draft_vocab.tenants import TenantMemory
from engine.messages import SessionState
from engine.request import Request
from kernels.native_sessions import Sessions
from kernels.session_options import NUM_FEATURES

log = structlog.get_logger(__name__)


class SessionPast:
    """Fills the slots of new sessions from what is remembered, and remembers what ended ones have learned.

    Args:
        options: which parts are on.
        resources: what there is.
        sessions: whose slots they are.
    """

    def __init__(self, options: DynamicConfig, resources: Resources, sessions: Sessions) -> None:
        self._prior, self._resources, self._sessions = options.prior, resources, sessions
        self._memory = TenantMemory() if options.tenant_memory else None
        self.num_refused_snapshots = 0

    def begin(self, session: int, request: Request) -> tuple[list[int], list[int]]:
        """Give a slot its weights and counts.

        Returns:
            tokens that the session had in its tail, and tokens that its tenant's sessions have used, best first.
        """
        snapshot = self._read(request.draft_state.past)
        self._sessions.clear(session, self._weights(request, snapshot))
        past = []
        if snapshot is not None:
            restore(self._sessions, session, snapshot.ngram_counts())
            self._sessions.go_on(session, snapshot.num_verified_tokens, snapshot.num_observed_tokens)
            past = snapshot.tail_token_ids()
        if self._memory is None or not self._resources.slots:
            return past, []
        return past, self._memory.top(request.tenant, request.domain, self._resources.slots + len(past))

    def _read(self, state: SessionState | None) -> SessionSnapshot | None:
        """The session's past, None if it has none that can be used."""
        if state is None or not state.snapshot:
            return None
        try:
            return decode(state.snapshot, self._resources.fingerprint, self._sessions.vocab_size)
        except SnapshotError as error:
            self.num_refused_snapshots += 1
            log.warning("a session starts cold: its snapshot cannot be used", reason=str(error))
            return None

    def _weights(self, request: Request, snapshot: SessionSnapshot | None) -> Sequence[float]:
        if self._prior == "fixed":
            return LIGHT_DRAFT_WEIGHTS
        if snapshot is not None:
            return snapshot.weights
        known = None if self._memory is None else self._memory.weights(request.tenant, request.domain)
        return known or self._resources.start_weights or [0.0] * NUM_FEATURES

    def pack(self, session: int) -> bytes:
        """What is kept of a session for its next request."""
        counts = self._sessions.counts(session)
        snapshot = make_snapshot(
            vocabulary=self._resources.fingerprint,
            num_verified_tokens=counts.num_read,
            num_observed_tokens=counts.num_counted,
            weights=self._sessions.weights(session).tolist(),
            tail=self._sessions.tail(session),
            ngrams=strongest(self._sessions, session, MAX_NGRAMS),
        )
        return encode(snapshot)

    def remember(self, session: int, request: Request) -> None:
        """Let the tenant's next sessions start with what this one has said and learned."""
        if self._memory is None:
            return
        core = self._resources.core
        said = [token_id for token_id in request.output_token_ids if not core[token_id]]
        self._memory.add(request.tenant, request.domain, said)
        if self._sessions.counts(session).num_lessons:
            self._memory.end_session(request.tenant, request.domain, self._sessions.weights(session).tolist())
