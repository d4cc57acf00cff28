"""All that is kept in Redis, in each kind of it: a cluster with TLS, and a primary that Sentinel replaces."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from benchmarks.common.process import free_port
from benchmarks.fleet.valkeys import PASSWORD, Valkeys, running_cluster, running_sentinel
from evospec.adapters.alignment.control import ControlChannel
from evospec.adapters.alignment.shared_versions import SharedVersions
from evospec.engine.online.adapter_control import AdapterStatus, WorkerStatus
from evospec.engine.online.token_log import TokenLog, TokenLogReader
from evospec.engine.online.weight_layout import TensorSpec, WeightLayout
from evospec.engine.redis_clients import check_url
from evospec.server.adapter_control import AdapterControl
from evospec.server.errors import ApiError
from evospec.server.options import ResponsesConfig, SessionsConfig
from evospec.server.rate_limit import RateLimiter
from evospec.server.redis_gate import RedisGate
from evospec.server.responses.store import ResponseStore
from evospec.server.session_ids import new_session_id
from evospec.server.session_store import LoadedSession
from evospec.server.tenants import Tenant
from tests.integration.snapshots import snapshot_of, tokens_of
from tests.integration.test_session_store import ENGINE, TENANT, Fixture, server_at
from tests.integration.test_token_log import STREAM, record
from tests.proxy import Proxy, make_certificate

LAYOUT = WeightLayout((TensorSpec("w", (1,), torch.float32),), base="draft")


@asynccontextmanager
async def cluster_with_tls(directory: Path) -> AsyncIterator[Valkeys]:
    certificate = make_certificate(directory)
    ports = [free_port() for _ in range(3)]
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(port, certificate).running()) for port in ports]
        seen = [proxy.port for proxy in proxies]
        cluster = await stack.enter_async_context(running_cluster(directory, ports=ports, seen_ports=seen))
        url = cluster.url.replace("redis+", "rediss+") + f"?ssl_ca_certs={certificate}"
        yield Valkeys(url, cluster.processes)


@pytest.fixture(params=[cluster_with_tls, running_sentinel], ids=["cluster with TLS", "Sentinel"])
async def redis(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Valkeys]:
    async with request.param(tmp_path) as valkeys:
        yield valkeys


async def test_all_that_is_kept_is_kept_there(redis: Valkeys, tmp_path: Path) -> None:
    await asyncio.to_thread(log_and_learn, redis.url)
    async with server_at(redis.url, SessionsConfig(max_per_tenant=4)) as server:
        ids = [new_session_id(TENANT) for _ in range(8)]
        for number, session_id in enumerate(ids):
            await server.store.save(await server.load(session_id), [snapshot_of([number])])
        kept = [tokens_of((await server.load(session_id)).state.snapshot) for session_id in ids[4:]]
        assert kept == [{4}, {5}, {6}, {7}]
        with pytest.raises(ApiError):
            await server.store.read(TENANT, ids[0])  # which made room
        await server.store.delete(TENANT, ids[5])
        await limit_and_respond(server.gate)
        control = AdapterControl(server.gate, STREAM)
        [adapter] = (await control.status())[1]
        assert adapter == "t"
        assert [await control.others_have_learned(layout) for layout in (LAYOUT.name, "another")] == [True, False]


async def limit_and_respond(gate: RedisGate) -> None:
    responses = ResponseStore(gate, ResponsesConfig(max_bytes_per_tenant=30))
    first, second = (f"resp_{uuid.uuid4().hex}" for _ in range(2))
    for name in (first, second):
        assert await responses.save(TENANT, name, b"twenty bytes or more")
    async with responses.load(TENANT, second) as conversation:
        assert conversation == b"twenty bytes or more"
    with pytest.raises(ApiError):
        await responses.delete(TENANT, first)  # which made room
    limiter = RateLimiter(gate, "closed")
    tenant = Tenant(name=TENANT, requests_per_minute=2, tokens_per_minute=100)
    await limiter.admit(tenant, 60)
    with pytest.raises(ApiError, match="tokens a minute"):
        await RateLimiter(gate, "closed").admit(tenant, 60)  # another server's


def log_and_learn(url: str) -> None:
    log, reader = TokenLog(url, STREAM, interval=0.05), TokenLogReader(url, STREAM)
    log.log(record(0))
    log.close()
    assert log.stats.num_written == 1
    [found] = reader.read(9)
    reader.acknowledge([found])
    assert reader.backlog() == 0
    control = ControlChannel(url, STREAM)
    numbers = dict.fromkeys(WorkerStatus.__struct_fields__, 0)
    worker = WorkerStatus(**(numbers | {"is_attached": True, "is_paused": False}))  # type: ignore[arg-type]
    control.report(worker, {"t": AdapterStatus()})
    assert not control.take()
    first, second = (SharedVersions(url, LAYOUT) for _ in range(2))
    assert first.leads("t")
    assert not second.leads("t")
    number = first.publish("t", None)
    assert number
    assert second.look("t") == (number, 0, None)
    for each in (reader, control, first, second):
        each.close()


async def load_at_last(server: Fixture, session_id: str) -> LoadedSession:
    """The session, once Redis is found again."""
    async with asyncio.timeout(60):
        while (session := await server.store.load(TENANT, session_id, ENGINE)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return session


async def test_what_a_primary_knew_the_next_one_knows(tmp_path: Path) -> None:
    async with (
        running_sentinel(tmp_path) as valkeys,
        server_at(valkeys.url, timeout=1.0, retry_interval=0.1) as server,
    ):
        session_id = new_session_id(TENANT)
        await server.store.save(await server.load(session_id), [snapshot_of([1])])
        await valkeys.processes[0].kill()
        session = await load_at_last(server, session_id)
        assert tokens_of(session.state.snapshot) == {1}
        await server.store.save(session, [snapshot_of([2])])
        assert tokens_of((await server.load(session_id)).state.snapshot) == {2}


async def test_a_cluster_that_comes_late_is_found(tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    url = f"redis+cluster://:{quote(PASSWORD)}@127.0.0.1:{ports[0]}"
    async with server_at(url, timeout=1.0, retry_interval=0.1) as server:
        session_id = new_session_id(TENANT)
        assert await server.store.load(TENANT, session_id, ENGINE) is None
        async with running_cluster(tmp_path, ports=ports):
            await load_at_last(server, session_id)


async def test_a_server_that_is_cut_off_goes_on_and_undoes_nothing(valkey_url: str) -> None:
    session_id = new_session_id(TENANT)
    async with (
        Proxy(Path(valkey_url.removeprefix("unix://"))).running() as network,
        server_at(f"redis://127.0.0.1:{network.port}", timeout=0.3, retry_interval=0.05) as cut_off,
        server_at(valkey_url) as other,
    ):
        begun = await cut_off.load(session_id)
        network.cut()
        assert await cut_off.store.load(TENANT, session_id, ENGINE) is None
        await asyncio.sleep(0.1)  # it tries again
        await cut_off.store.save(begun, [snapshot_of([1])])
        await other.store.save(await other.load(session_id), [snapshot_of([2])])
        network.mend()  # what was sent to Redis comes late
        session = await load_at_last(cut_off, session_id)
        assert tokens_of(session.state.snapshot) == {2}
        await cut_off.store.save(begun, [snapshot_of([3])])
        assert tokens_of((await other.load(session_id)).state.snapshot) == {2, 3}


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("localhost:6379", "begins with one of redis://"),
        ("redis-cluster://localhost", "begins with one of redis://"),
        ("redis+sentinel://localhost", "name of the primary"),
        ("redis+cluster://localhost:6379,", "host is missing"),
        ("redis+cluster://localhost:port", "Port could not be cast"),
        ("redis+cluster://localhost/1", "no databases"),
        ("redis://localhost?db=first", "Invalid value for 'db'"),
    ],
)
def test_a_url_of_which_no_client_can_be_made(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_url(url)
