"""What a session starts with, and what it leaves behind: its own snapshot, and what its tenant has in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import structlog
from numpy.typing import NDArray

from evospec.engine.config import DynamicConfig
from evospec.engine.draft_vocab.ngram_counts import restore, strongest
from evospec.engine.draft_vocab.resources import LIGHT_DRAFT_WEIGHTS, Resources
from evospec.engine.draft_vocab.running_texts import TEXT_BEFORE
from evospec.engine.draft_vocab.snapshot import (
    MAX_NGRAMS,
    SessionSnapshot,
    SnapshotError,
    decode,
    encode,
    make_snapshot,
)
from evospec.engine.request import Request
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.session_options import MAX_WEIGHT, NUM_FEATURES

log = structlog.get_logger(__name__)

MAX_TENANTS, MAX_DOMAINS, MAX_TOKENS = 256, 16, 4096
MAX_REMEMBERED = 1024 * MAX_TOKENS
"""Counts of all tenants and domains together. One takes 100 bytes."""
HALF_LIFE = 8192.0
"""Out-of-core tokens after which a count is worth half."""
_WEIGHTS_MEMORY = 0.8
"""Weight of the past in the average of session-end weights, for each session that has ended."""
_MAX_UNIT = 1e30


class DecayedCounts:
    """Counts of at most ``max_tokens`` tokens, of which each new one makes the older worth less.

    Args:
        max_tokens: the weakest are forgotten beyond; twice as many may be held for a while.
        half_life: in tokens counted.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS, half_life: float = HALF_LIFE) -> None:
        self._max_tokens, self._growth = max_tokens, 2.0 ** (1.0 / half_life)
        self._counts: dict[int, float] = {}
        self._unit = 1.0
        self._ranked: list[int] = []
        """As many as ``top`` was asked for since the last ``add``."""

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, token_ids: Iterable[int]) -> None:
        """Count each once more."""
        self._ranked = []
        for token_id in token_ids:
            self._unit *= self._growth
            self._counts[token_id] = self._counts.get(token_id, 0.0) + self._unit
        if len(self._counts) > 2 * self._max_tokens or self._unit > _MAX_UNIT:
            self._counts = {token_id: self._counts[token_id] / self._unit for token_id in self.top(self._max_tokens)}
            self._unit = 1.0

    def top(self, limit: int) -> list[int]:
        """At most ``limit`` tokens (and ``max_tokens``), the largest count first."""
        wanted = min(limit, self._max_tokens, len(self._counts))
        if len(self._ranked) < wanted:
            self._ranked = self._rank(wanted)
        return self._ranked[:wanted]

    def _rank(self, wanted: int) -> list[int]:
        size = len(self._counts)
        token_ids = np.fromiter(self._counts.keys(), np.int64, size)
        counts = np.fromiter(self._counts.values(), np.float64, size)
        is_large = counts >= np.partition(counts, size - wanted)[size - wanted]
        token_ids, counts = token_ids[is_large], counts[is_large]
        ranked: list[int] = token_ids[np.lexsort((token_ids, -counts))[:wanted]].tolist()
        return ranked


class _Memory:
    """Of one tenant as a whole, or of one of its domains."""

    def __init__(self) -> None:
        self.counts = DecayedCounts()
        self.weights: NDArray[np.float64] | None = None


class TenantMemory:
    """Out-of-core tokens that verification produced, and where the prior's weights ended; by tenant and domain.

    What a domain learns also counts for the tenant as a whole, from which a domain not seen before starts. Nothing
    passes between tenants. Sessions without a domain use the tenant's memory as a whole.

    Args:
        max_tenants: tenants remembered; the least recently used is forgotten beyond.
        max_domains: the same for the domains of a tenant, whose names are its clients' choice.
        max_remembered: counts of all; the least recently used tenant is forgotten beyond.
    """

    def __init__(
        self,
        max_tenants: int = MAX_TENANTS,
        max_domains: int = MAX_DOMAINS,
        max_remembered: int = MAX_REMEMBERED,
    ) -> None:
        self._max_tenants, self._max_domains, self._max_remembered = max_tenants, max_domains, max_remembered
        self._num_remembered = 0
        self._tenants: OrderedDict[str, OrderedDict[str | None, _Memory]] = OrderedDict()
        """By tenant, then domain; None is the tenant as a whole."""

    def add(self, tenant: str, domain: str | None, token_ids: Sequence[int]) -> None:
        """Tokens outside the static core that verification produced."""
        if token_ids:
            for memory in self._made(tenant, domain):
                before = len(memory.counts)
                memory.counts.add(token_ids)
                self._num_remembered += len(memory.counts) - before
            while self._num_remembered > self._max_remembered:
                self._forget(self._tenants.popitem(last=False)[1].values())

    def end_session(self, tenant: str, domain: str | None, weights: Sequence[float]) -> None:
        """The prior's weights at the end of a session: [NUM_FEATURES]."""
        ended = np.clip(np.asarray(weights, np.float64), 0.0, MAX_WEIGHT)
        for memory in self._made(tenant, domain):
            before = ended if memory.weights is None else memory.weights
            memory.weights = _WEIGHTS_MEMORY * before + (1.0 - _WEIGHTS_MEMORY) * ended

    def top(self, tenant: str, domain: str | None, limit: int) -> list[int]:
        """Tokens for a new session's tail, the most wanted first: the domain's, then other ones of the tenant."""
        token_ids: dict[int, None] = {}
        for memory in self._known(tenant, domain):
            token_ids |= dict.fromkeys(memory.counts.top(limit))
        return list(token_ids)[:limit]

    def weights(self, tenant: str, domain: str | None) -> list[float] | None:
        """Where a new session's prior starts: [NUM_FEATURES]; None for a tenant not seen before."""
        known = (memory.weights for memory in self._known(tenant, domain) if memory.weights is not None)
        found = next(known, None)
        return None if found is None else found.tolist()

    def _known(self, tenant: str, domain: str | None) -> list[_Memory]:
        """The domain's memory and the tenant's, as far as there are any."""
        domains = self._tenants.get(tenant, OrderedDict())
        return [domains[key] for key in _keys(domain) if key in domains]

    def _made(self, tenant: str, domain: str | None) -> list[_Memory]:
        """The domain's memory and the tenant's, made if need be, and the most recently used from now on."""
        domains = self._tenants.setdefault(tenant, OrderedDict())
        self._tenants.move_to_end(tenant)
        memories = []
        for key in _keys(domain):
            memories.append(domains.setdefault(key, _Memory()))
            domains.move_to_end(key)
        if len(domains) > self._max_domains + 1:
            self._forget([domains.popitem(last=False)[1]])
        if len(self._tenants) > self._max_tenants:
            self._forget(self._tenants.popitem(last=False)[1].values())
        return memories

    def _forget(self, memories: Iterable[_Memory]) -> None:
        """These have been taken out."""
        self._num_remembered -= sum(len(memory.counts) for memory in memories)


def _keys(domain: str | None) -> list[str | None]:
    return [None] if domain is None else [domain, None]


class SessionPast:
    """Fills the slots of new sessions from what is remembered, and remembers what ended ones have learned."""

    def __init__(self, options: DynamicConfig, resources: Resources, sessions: Sessions) -> None:
        self._prior, self._resources, self._sessions = options.prior, resources, sessions
        self._memory = TenantMemory() if options.tenant_memory else None
        self._read: dict[Request, SessionSnapshot | None] = {}
        """Of each sequence whose session's past was read."""
        self._latest: tuple[bytes, SessionSnapshot] | None = None
        """The snapshot read last, and what it holds: all choices of a request bring the same."""
        self.num_refused_snapshots = 0

    def begin(self, session: int, request: Request) -> tuple[list[int], list[int]]:
        """Give a slot its weights and counts.

        Returns:
            tokens that the session had in its tail, and tokens that its tenant's sessions have used, best first.
        """
        snapshot = self.recall(request)
        self._sessions.clear(session, self._weights(request, snapshot))
        past = []
        if snapshot is not None:
            restore(self._sessions, session, snapshot.ngram_counts())
            counts = self._sessions.counts(session)
            counts.num_read, counts.num_counted = snapshot.num_verified_tokens, snapshot.num_observed_tokens
            past = snapshot.tail_token_ids()
        if self._memory is None or not self._resources.slots:
            return past, []
        return past, self._memory.top(request.tenant, request.domain, self._resources.slots + len(past))

    def recall(self, request: Request) -> SessionSnapshot | None:
        """The past of a request's session, None if it has none that can be used; read once."""
        if request not in self._read:
            self._read[request] = None
            if request.session is not None and request.session.snapshot:
                try:
                    self._read[request] = self._decode(request.session.snapshot)
                except SnapshotError as error:
                    self.num_refused_snapshots += 1
                    log.warning("a session starts cold: its snapshot cannot be used", reason=str(error))
        return self._read[request]

    def history(self, request: Request) -> Sequence[int]:
        """The earlier answers of a request's session."""
        snapshot = self.recall(request)
        return () if snapshot is None else snapshot.said_token_ids()

    def end(self, request: Request) -> None:
        """A request is over."""
        self._read.pop(request, None)

    def _decode(self, data: bytes) -> SessionSnapshot:
        if self._latest is None or self._latest[0] != data:
            self._latest = data, decode(data, self._resources.fingerprint, self._sessions.vocab_size)
        return self._latest[1]

    def _weights(self, request: Request, snapshot: SessionSnapshot | None) -> Sequence[float]:
        if self._prior == "fixed":
            return LIGHT_DRAFT_WEIGHTS
        if snapshot is not None:
            return snapshot.weights
        known = None if self._memory is None else self._memory.weights(request.tenant, request.domain)
        return known or self._resources.start_weights or [0.0] * NUM_FEATURES

    def pack(self, session: int, request: Request) -> bytes:
        """What is kept of a session for its next request, after this one."""
        counts = self._sessions.counts(session)
        end_of_prompt = request.prompt_token_ids[-TEXT_BEFORE:]
        snapshot = make_snapshot(
            vocabulary=self._resources.fingerprint,
            num_verified_tokens=counts.num_read,
            num_observed_tokens=counts.num_counted,
            weights=self._sessions.weights(session).tolist(),
            tail=self._sessions.tail(session),
            ngrams=strongest(self._sessions, session, MAX_NGRAMS),
            said=[*self.history(request), *end_of_prompt, *request.output_token_ids],
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


class TenantTables:
    """Gives each tenant one of the sessions' tables at first use; when there are no more, the least recently used."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._tables: OrderedDict[str, int] = OrderedDict()

    def of(self, tenant: str) -> int:
        """The tenant's; for this step only, as another may get it in a later one."""
        table = self._tables.get(tenant)
        if table is None:
            is_new = len(self._tables) < self._sessions.options.num_tenants
            table = len(self._tables) if is_new else self._tables.popitem(last=False)[1]
            self._sessions.clear_tenant(table)
            self._tables[tenant] = table
        self._tables.move_to_end(tenant)
        return table
