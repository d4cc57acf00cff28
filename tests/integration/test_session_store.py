"""The session store on a real Valkey: merging, deletion, and whatever may have become of a value."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from evospec.engine.draft_vocab.snapshot import MAX_BYTES
from evospec.engine.messages import EngineReady
from evospec.server import session_store
from evospec.server.errors import ApiError
from evospec.server.metrics import Metrics
from evospec.server.options import RedisConfig, SessionsConfig
from evospec.server.redis_gate import REDIS_ERRORS, RedisGate
from evospec.server.session_hashes import Conflict
from evospec.server.session_ids import find_session_id, new_session_id, session_key, user_session_id
from evospec.server.session_store import LoadedSession, SessionStore
from evospec.server.work_shares import WorkShares
from tests.integration.snapshots import counts_of, snapshot_of, tokens_of
from tests.tiny_models import VOCAB_SIZE, VOCABULARY

TENANT = "acme"
ENGINE = EngineReady(
    epoch="e", model="tiny", max_model_len=64, vocab_size=VOCAB_SIZE, num_blocks=8, block_size=16, max_num_seqs=4,
    dtype="float32", attention_backend="none", vocabulary=VOCABULARY,
)  # fmt: skip


class Fixture:
    """A store as one server has it, with its own connection."""

    def __init__(self, url: str, sessions: SessionsConfig | None = None, **config: float) -> None:
        self.metrics = Metrics("tiny")
        self.gate = RedisGate(url, RedisConfig(**{"timeout": 10.0} | config))
        self.store = SessionStore(self.gate, sessions or SessionsConfig(), self.metrics, WorkShares())

    async def load(self, session_id: str) -> LoadedSession:
        session = await self.store.load(TENANT, session_id, ENGINE)
        assert session is not None
        return session

    def count(self, name: str, **labels: str) -> float:
        labels = {"model": "tiny", "tenant": TENANT, "domain": "", **labels}
        return self.metrics.registry.get_sample_value(f"evospec:session_{name}_total", labels) or 0.0


@asynccontextmanager
async def server_at(url: str, sessions: SessionsConfig | None = None, **config: float) -> AsyncIterator[Fixture]:
    fixture = Fixture(url, sessions, **config)
    try:
        yield fixture
    finally:
        await fixture.store.close()
        await fixture.gate.close()


@pytest.fixture
async def server(valkey_url: str) -> AsyncIterator[Fixture]:
    async with server_at(valkey_url) as fixture:
        yield fixture


@pytest.fixture
def session_id() -> str:
    return new_session_id(TENANT)


async def test_saves_of_many_requests_on_several_servers_lose_nothing(valkey_url: str, session_id: str) -> None:
    async with (
        server_at(valkey_url) as one,
        server_at(valkey_url) as two,
        server_at(valkey_url) as three,
    ):
        servers = [one, two, three] * 8
        sessions = [await server.load(session_id) for server in servers]
        await asyncio.gather(
            *(
                server.store.save(session, [snapshot_of([100 + number], counts={7: 1.0})])
                for number, (server, session) in enumerate(zip(servers, sessions, strict=True))
            )
        )
        stored = (await one.load(session_id)).state.snapshot
        outcomes = [
            sum(s.count("operations", operation="save", outcome=outcome) for s in (one, two, three))
            for outcome in ("saved", "merged")
        ]
    assert tokens_of(stored) == set(range(100, 124))
    assert counts_of(stored) == {7: 24.0}
    assert outcomes == [1, 23]


async def test_what_others_wrote_is_counted_once_however_often_a_save_must_try(
    valkey_url: str, session_id: str, monkeypatch: Any
) -> None:
    async with server_at(valkey_url) as one, server_at(valkey_url) as two:
        sessions = [await one.load(session_id) for _ in range(4)]
        write, tries = one.store._hashes.write, 0

        async def write_after_another(*arguments: Any) -> Any:
            nonlocal tries
            tries += 1
            if tries <= 3:
                await two.store.save(sessions[tries - 1], [snapshot_of([tries], counts={7: 1.0})])
            return await write(*arguments)

        monkeypatch.setattr(one.store._hashes, "write", write_after_another)
        await one.store.save(sessions[3], [snapshot_of([4], counts={7: 1.0})])
        stored = (await one.load(session_id)).state.snapshot
    assert tries == 4
    assert tokens_of(stored) == {1, 2, 3, 4}
    assert counts_of(stored) == {7: 4.0}


async def test_a_save_that_never_gets_its_turn_is_given_up_and_counted(
    server: Fixture, session_id: str, monkeypatch: Any
) -> None:
    session, tries = await server.load(session_id), 0

    async def conflict(*_: Any) -> Conflict:
        nonlocal tries
        tries += 1
        return Conflict(b"another", b"")

    monkeypatch.setattr(server.store._hashes, "write", conflict)
    with capture_logs() as lines:
        await server.store.save(session, [snapshot_of([3])])
    assert tries == session_store.MAX_ATTEMPTS
    assert server.count("operations", operation="save", outcome="conflict") == 1
    assert len(lines) == 1


async def test_a_save_goes_on_when_its_request_is_cancelled(server: Fixture, session_id: str) -> None:
    session = await server.load(session_id)
    request = asyncio.create_task(server.store.save(session, [snapshot_of([3])]))
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await server.store.close()
    assert request.cancelled()
    assert tokens_of((await server.load(session_id)).state.snapshot) == {3}


async def field(redis: Redis, key: str, name: str, value: str | bytes) -> None:
    await redis.hset(key, name, value)


async def string(redis: Redis, key: str) -> None:
    await redis.set(key, "secret words")


async def foreign_hash(redis: Redis, key: str) -> None:
    await redis.delete(key)
    await redis.hset(key, "snapshot", "secret words")


POISONS: dict[str, tuple[str, Callable[[Redis, str], Awaitable[object]]]] = {
    "garbage": ("corrupt", lambda redis, key: field(redis, key, "snapshot", b"\x93secret words")),
    "cut": ("corrupt", lambda redis, key: field(redis, key, "snapshot", snapshot_of([3])[:-1])),
    "another model's": ("corrupt", lambda redis, key: field(redis, key, "snapshot", snapshot_of([3], vocabulary="x"))),
    "id too large": ("corrupt", lambda redis, key: field(redis, key, "snapshot", snapshot_of([VOCAB_SIZE]))),
    "too large": ("oversized", lambda redis, key: field(redis, key, "snapshot", bytes(MAX_BYTES + 1))),
    "no ttl": ("corrupt", lambda redis, key: redis.hdel(key, "ttl")),
    "words for ttl": ("corrupt", lambda redis, key: field(redis, key, "ttl", "secret words")),
    "endless ttl": ("corrupt", lambda redis, key: field(redis, key, "ttl", "9" * 30)),
    "negative ttl": ("corrupt", lambda redis, key: field(redis, key, "ttl", "-1")),
    "no creation": ("corrupt", lambda redis, key: field(redis, key, "created", "")),
    "not a hash": ("corrupt", string),
    "another hash": ("corrupt", foreign_hash),
}


@pytest.mark.parametrize("name", POISONS)
async def test_whatever_became_of_a_value_the_session_starts_anew(
    server: Fixture, session_id: str, name: str, caplog: Any
) -> None:
    reason, poison = POISONS[name]
    errors = REDIS_ERRORS._value.get()
    await server.store.save(await server.load(session_id), [snapshot_of([3])])
    await poison(server.gate.redis, session_key(TENANT, "tiny", session_id))
    with capture_logs() as lines:
        session = await server.load(session_id)
        assert session.state.snapshot == b""
        await server.store.save(session, [snapshot_of([4])])
        assert tokens_of((await server.load(session_id)).state.snapshot) == {4}
    assert [(line["event"], line["reason"]) for line in lines] == [("session snapshot dropped", reason)]
    assert "secret" not in str(lines)
    assert server.count("snapshots_dropped", operation="load", reason=reason) == 1
    assert REDIS_ERRORS._value.get() == errors  # the gate stays open for the others


async def test_a_domain_that_cannot_be_is_not_believed(server: Fixture, session_id: str) -> None:
    await server.store.create(TENANT, session_id, "law", 60)
    await server.gate.redis.hset(session_key(TENANT, "tiny", session_id), "domain", b"\xff</script>")
    assert (await server.load(session_id)).state.domain == ""
    assert (await server.store.read(TENANT, session_id)).domain is None


async def test_what_becomes_corrupt_while_a_request_runs_is_replaced(server: Fixture, session_id: str) -> None:
    session, other = await server.load(session_id), await server.load(session_id)
    await server.store.save(other, [snapshot_of([3])])
    await server.gate.redis.hset(session_key(TENANT, "tiny", session_id), "snapshot", b"secret words")
    with capture_logs() as lines:
        await server.store.save(session, [snapshot_of([4])])
    assert tokens_of((await server.load(session_id)).state.snapshot) == {4}
    assert server.count("snapshots_dropped", operation="save", reason="corrupt") == 1
    assert "secret" not in str(lines)


@pytest.mark.parametrize(("bad", "reason"), [(bytes(MAX_BYTES + 1), "oversized"), (b"?", "corrupt")])
async def test_an_engine_cannot_store_what_is_no_snapshot(
    server: Fixture, session_id: str, bad: bytes, reason: str
) -> None:
    await server.store.save(await server.load(session_id), [snapshot_of([3])])
    with capture_logs() as lines:
        await server.store.save(await server.load(session_id), [bad])
    assert tokens_of((await server.load(session_id)).state.snapshot) == {3}
    assert server.count("operations", operation="save", outcome="refused") == 1
    assert server.count("snapshots_dropped", operation="save", reason=reason) == 1
    assert len(lines) == 1
    await server.store.save(await server.load(session_id), [bad, snapshot_of([4])])
    assert tokens_of((await server.load(session_id)).state.snapshot) == {4}


async def test_redis_down_costs_one_wait_and_one_log_line(tmp_path: Path, session_id: str) -> None:
    with capture_logs() as lines:
        async with server_at(f"unix://{tmp_path / 'nobody.sock'}", timeout=0.2, retry_interval=60) as server:
            started = time.monotonic()
            for _ in range(20):
                assert await server.store.load(TENANT, session_id, ENGINE) is None
            with pytest.raises(ApiError) as caught:
                await server.store.delete(TENANT, session_id)
            assert time.monotonic() - started < 5
            assert server.count("operations", operation="load", outcome="unavailable") == 20
    assert (caught.value.status, caught.value.code) == (503, "sessions_unavailable")
    assert [line["event"] for line in lines] == ["redis is down"]


async def test_the_mark_of_a_deleted_session_holds_nothing_and_expires(server: Fixture, session_id: str) -> None:
    key = session_key(TENANT, "tiny", session_id)
    await server.store.create(TENANT, session_id, "law", 60)
    await server.store.save(await server.load(session_id), [snapshot_of([3])])
    await server.store.delete(TENANT, session_id)
    assert await server.gate.redis.hgetall(key) == {b"deleted": b"1"}
    assert 0 < await server.gate.redis.ttl(key) <= 60
    with pytest.raises(ApiError, match="no session"):
        await server.store.load(TENANT, session_id, ENGINE)


def test_ids_tell_whose_they_are() -> None:
    for session_id in (new_session_id("acme"), user_session_id("acme", "sam")):
        assert find_session_id("acme", session_id) == session_id
        assert find_session_id("other", session_id) is None
        for name in (session_id + "\n", session_id.upper(), session_id[:-1]):
            assert (find_session_id("acme", name) or "").startswith("name_")
    assert user_session_id("acme", "sam") == user_session_id("acme", "sam")
    assert len({user_session_id(tenant, user) for tenant in ("acme", "other") for user in ("sam", "kim")}) == 4
    assert session_key("acme", "tiny", "x") != session_key("acme", "other", "x")
    assert "sam" not in user_session_id("acme", "sam")
