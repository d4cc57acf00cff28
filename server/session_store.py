"""Sessions: what the engine wants kept between the requests of one conversation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal
from weakref import WeakValueDictionary

import structlog

from evospec.engine.draft_vocab.snapshot import MAX_BYTES, SessionSnapshot, SnapshotError, decode, encode, merge
from evospec.engine.messages import EngineReady, SessionState
from evospec.server.errors import ApiError
from evospec.server.metrics import NO_DOMAIN, Metrics
from evospec.server.options import SessionsConfig
from evospec.server.redis_gate import RedisGate, RedisUnavailable, needs_redis
from evospec.server.schemas.sessions import Session
from evospec.server.session_hashes import Conflict, OpenedHash, SessionHashes
from evospec.server.session_ids import is_named, session_key
from evospec.server.shielded import ShieldedTasks
from evospec.server.work_shares import WorkShares

log = structlog.get_logger(__name__)

Fault = Literal["oversized", "corrupt"]

# The saves of one server take turns, so others only come between where several servers keep writing one session.
MAX_ATTEMPTS = 32
# A request can have 2,048 choices, and merging takes up to 30 ms each; the last to finish are merged.
MAX_MERGED = 16


@dataclass(frozen=True)
class SnapshotReader:
    """Reads the snapshots of one model: its tokens have the fingerprint ``vocabulary`` and ids below ``vocab_size``."""

    vocabulary: str
    vocab_size: int

    def find_fault(self, data: bytes) -> Fault | None:
        """Why ``data`` cannot be used; None if it can."""
        if len(data) > MAX_BYTES:
            return "oversized"
        try:
            self._decode(data)
        except SnapshotError:
            return "corrupt"
        return None

    def merge(self, base: bytes, snapshots: Sequence[bytes], on_fault: Callable[[Fault], None]) -> bytes | None:
        """What all of ``snapshots`` know as one; None if none of them can be used.

        ``base`` is what they started from (empty: nothing). ``on_fault`` is told of each that cannot be used.
        """
        sound = []
        for data in snapshots:
            fault = self.find_fault(data)
            if fault is None:
                sound.append(data)
            else:
                on_fault(fault)
        if len(sound) < 2:
            return sound[0] if sound else None
        start = self._decode(base) if base else None
        return encode(reduce(lambda a, b: merge(a, b, start), map(self._decode, sound)))

    def _decode(self, data: bytes) -> SessionSnapshot:
        return decode(data, self.vocabulary, self.vocab_size)


@dataclass(frozen=True)
class LoadedSession:
    """A session as a request found it. ``state`` goes to the engine, all of it back to ``SessionStore.save``."""

    state: SessionState
    tenant: str
    key: str
    opened: OpenedHash
    reader: SnapshotReader


@dataclass
class _Observation:
    """What an operation's metrics will say."""

    outcome: str = "unavailable"
    domain: str = NO_DOMAIN


class SessionStore:
    """Loads a session when a request is admitted and saves it at the end, with one round trip to Redis each.

        session = await store.load(tenant, session_id, engine_info)  # None: Redis is down, go on without
        ...
        await store.save(session, snapshots)

    Two requests of one session may run at once: the later save finds another version than the request had loaded, and
    stores what was there and its own, merged. A request that runs while its session is deleted does not bring it
    back: the incarnation it knows is gone, even if there is a new session of the same name.
    """

    def __init__(self, gate: RedisGate, config: SessionsConfig, metrics: Metrics, work: WorkShares) -> None:
        self.config = config
        self._metrics = metrics
        self._work = work
        self._hashes = SessionHashes(gate, MAX_BYTES, config.max_per_tenant)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._saves = ShieldedTasks()

    async def create(self, tenant: str, session_id: str, domain: str | None, ttl_seconds: int | None) -> Session:
        """Start a session; one that exists, as a ``user``'s may, stays as it is. Raises ``ApiError``: 404, 503."""
        with self._observe("create", tenant) as seen, _needs_redis():
            opened = await self._open(tenant, session_id, seen, domain or NO_DOMAIN, ttl_seconds)
        return _to_session(session_id, opened.domain, opened.created, opened.ttl_seconds)

    async def read(self, tenant: str, session_id: str) -> Session:
        """What is known of a session. Raises ``ApiError``: 404, or 503 if Redis is down."""
        with self._observe("read", tenant) as seen, _needs_redis():
            found = await self._hashes.read(self._key(tenant, session_id))
            seen.outcome = "missing" if found is None else "found"
        if found is None:
            raise no_such_session(session_id)
        return _to_session(session_id, *found)

    async def delete(self, tenant: str, session_id: str) -> None:
        """Forget a session at once. Raises ``ApiError``: 404, or 503 if Redis is down.

        Requests that name an id of the server's own making are refused from then on. Whoever goes on with a name that
        the client chose has a new session.
        """
        leave_mark = not is_named(session_id)
        with self._observe("delete", tenant) as seen, _needs_redis():
            existed = await self._hashes.delete(self._key(tenant, session_id), leave_mark)
            seen.outcome = "deleted" if existed else "missing"
        if not existed:
            raise no_such_session(session_id)

    async def load(self, tenant: str, session_id: str, info: EngineReady) -> LoadedSession | None:
        """The session for one request; None if Redis is down or slow. Raises ``ApiError``: 404 if it was deleted.

        A session that has expired, or that Redis has lost, starts again without a domain.
        """
        with self._observe("load", tenant) as seen, suppress(RedisUnavailable):
            opened = await self._open(tenant, session_id, seen)
            snapshot, reader = opened.snapshot, SnapshotReader(info.vocabulary, info.vocab_size)
            fault = await self._work.run(tenant, len(snapshot), reader.find_fault, snapshot) if snapshot else None
            if fault is not None:
                self._drop("load", fault, tenant, opened.domain)
                snapshot = b""
            state = SessionState(snapshot=snapshot, domain=opened.domain)
            return LoadedSession(state, tenant, self._key(tenant, session_id), opened, reader)
        return None

    async def save(self, session: LoadedSession, snapshots: Sequence[bytes]) -> None:
        """Keep what the request's sequences ended with, if Redis is there; goes on if the caller is cancelled."""
        if snapshots:
            await self._saves.run(self._save(session, snapshots))

    def save_later(self, session: LoadedSession, snapshot: bytes) -> None:
        """Keep what a sequence ended with whose request is gone; nobody waits for it."""
        self._saves.start(self._save(session, [snapshot]))

    async def close(self) -> None:
        """Wait for saves whose callers were cancelled."""
        await self._saves.close()

    async def _open(
        self, tenant: str, session_id: str, seen: _Observation, domain: str = NO_DOMAIN, ttl_seconds: int | None = None
    ) -> OpenedHash:
        key = self._key(tenant, session_id)
        opened = await self._hashes.open(key, domain, ttl_seconds or self.config.ttl_seconds)
        if opened is None:
            seen.outcome = "deleted"
            raise no_such_session(session_id)
        seen.domain = opened.domain
        seen.outcome = "found" if opened.status in ("found", "oversized") else "created"
        if opened.status in ("oversized", "corrupt"):
            self._drop("load", opened.status, tenant, opened.domain)
        return opened

    async def _save(self, session: LoadedSession, snapshots: Sequence[bytes]) -> None:
        async with self._turns.setdefault(session.key, asyncio.Lock()):
            with self._observe("save", session.tenant, session.state.domain) as seen, suppress(RedisUnavailable):
                seen.outcome = await self._write(session, snapshots)

    async def _write(self, session: LoadedSession, snapshots: Sequence[bytes]) -> str:
        """Store all snapshots, and what other requests have stored meanwhile, as one. Returns the outcome."""
        mine = await self._merge(session, snapshots[-MAX_MERGED:])
        if mine is None:
            return "refused"
        opened = session.opened
        version, merged = opened.version, mine
        for attempt in range(MAX_ATTEMPTS):
            result = await self._hashes.write(session.key, opened.incarnation, version, merged, opened.ttl_seconds)
            if not isinstance(result, Conflict):
                return "merged" if attempt and result == "saved" else result
            # NOTE: merged with ``mine``, not with ``merged``, which may have the other requests' news in it already.
            version, both = result.version, [result.snapshot, mine] if result.snapshot else [mine]
            merged = await self._merge(session, both) or mine
        log.warning("session not saved: other servers kept writing it")
        return "conflict"

    async def _merge(self, session: LoadedSession, snapshots: Sequence[bytes]) -> bytes | None:
        tenant, state = session.tenant, session.state
        on_fault = partial(self._drop, "save", tenant=tenant, domain=state.domain)
        size = sum(map(len, snapshots))
        return await self._work.run(tenant, size, session.reader.merge, state.snapshot, snapshots, on_fault)

    def _drop(self, operation: str, fault: Fault, tenant: str, domain: str) -> None:
        """Count and log a snapshot thrown away; what was in it is nobody's business."""
        self._metrics.observe_dropped_snapshot(operation, fault, tenant, domain)
        log.warning("session snapshot dropped", operation=operation, reason=fault)

    def _key(self, tenant: str, session_id: str) -> str:
        return session_key(tenant, self._metrics.model, session_id)

    @contextmanager
    def _observe(self, operation: str, tenant: str, domain: str = NO_DOMAIN) -> Iterator[_Observation]:
        seen, started = _Observation(domain=domain), time.monotonic()
        try:
            yield seen
        finally:
            seconds = time.monotonic() - started
            self._metrics.observe_session(operation, seen.outcome, seconds, tenant, seen.domain)


def no_such_session(session_id: str) -> ApiError:
    """The 404 for an id that is unknown, deleted or another tenant's: the client cannot tell which."""
    return ApiError(
        404,
        f"There is no session {session_id[:100]!r}. POST /v1/sessions makes one.",
        param="session_id",
        code="session_not_found",
    )


_needs_redis = partial(needs_redis, "Sessions cannot be reached at the moment.", code="sessions_unavailable")


def _to_session(session_id: str, domain: str, created: int, ttl_seconds: int) -> Session:
    return Session(id=session_id, domain=domain or None, created=created, expires_at=int(time.time()) + ttl_seconds)
