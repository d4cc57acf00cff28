"""Two servers' workers that share what they learn through a real Valkey; drafts are tiny, engines made up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from redis import Redis

from evospec.adapters.alignment import shared_versions
from evospec.adapters.alignment import worker as worker_program
from evospec.adapters.alignment.shared_versions import SharedVersion, SharedVersions
from evospec.adapters.alignment.worker import AdapterWorker
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.online.weight_layout import WeightLayout
from tests.drifting_traffic import Answer, DriftingTraffic, MadeUpEngine, TinyDraft
from tests.integration.test_adapter_worker import (
    adapter_layout,
    command,
    eager_worker,
    make_config,
    serve_until_published,
    status,
    step_until,
)
from tests.proxy import Proxy
from tests.unit.test_guard import sampled


@pytest.fixture(autouse=True)
def _ticks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take commands, exchange versions and report ten times a second, where once is enough otherwise."""
    monkeypatch.setattr(worker_program, "_TICK", 0.1)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return TinyDraft.make(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def answers(draft: TinyDraft) -> list[Answer]:
    """The last 32 are never served, only measured."""
    return DriftingTraffic(draft.drafter).answers(192)


class Server:
    """An engine and its worker, with directories and a token log of their own."""

    def __init__(self, directory: Path, valkey_url: str, draft: TinyDraft) -> None:
        directory.mkdir()
        self._draft = draft
        config = make_config(directory, valkey_url)
        self.config: AdaptersConfig = config.model_copy(update={"share_versions": True})
        self.engine = MadeUpEngine(self.config, draft.drafter, draft.base)
        self.worker: AdapterWorker = eager_worker(self.config, draft)

    def restart(self) -> None:
        """Another worker in place of the one that there is."""
        self.worker.close()
        self.worker = eager_worker(self.config, self._draft)


def step_both_until(servers: tuple[Server, Server], condition: Callable[[], bool]) -> None:
    """Until what one server has put in force has come to the other."""
    first, second = servers

    def has_come() -> bool:
        second.worker.step()
        return condition()

    step_until(first.worker, has_come)


@pytest.fixture
def servers(tmp_path: Path, valkey_url: str, draft: TinyDraft) -> Iterator[tuple[Server, Server]]:
    Redis.from_url(valkey_url).flushall()
    first, second = (Server(tmp_path / name, valkey_url, draft) for name in ("first", "second"))
    yield first, second
    first.worker.close()
    second.worker.close()


def test_what_one_server_learns_is_in_force_at_all_until_it_is_taken_back(
    servers: tuple[Server, Server], answers: list[Answer]
) -> None:
    first, second = servers
    before = second.engine.acceptance(answers[160:])
    second.engine.serve(answers[:2])
    step_until(second.worker, lambda: status(second.config).num_records > 0)
    serve_until_published(first.engine, first.worker, answers, 2)
    step_both_until(
        servers, lambda: second.engine.acceptance(answers[160:]) == first.engine.acceptance(answers[160:]) > before
    )
    assert status(second.config).num_updates == 0
    while first.engine.version("t"):  # a version, then the good one before it
        command(first.config, "rollback")
        num_rolled_back = status(first.config).num_rolled_back
        step_until(first.worker, lambda: status(first.config).num_rolled_back > num_rolled_back)  # noqa: B023
    step_both_until(servers, lambda: second.engine.version("t") == 0)
    assert second.engine.acceptance(answers[160:]) == before


def has_text_of(worker: AdapterWorker) -> bool:
    """Whether a worker keeps anything of the tenant's traffic, or of what was learned from it."""
    aligner = worker._roster.aligners["t"]
    return aligner.replay.num_segments > 0 or aligner.replay.num_held_out_positions > 0 or aligner.revision > 0


@pytest.mark.parametrize("has_slot", [True, False], ids=["its tenant is known there", "nobody has asked there"])
def test_a_command_to_any_server_is_obeyed_by_all(
    servers: tuple[Server, Server], answers: list[Answer], has_slot: bool
) -> None:
    first, second = servers
    if has_slot:
        second.engine.serve(answers[:2])
        step_until(second.worker, lambda: status(second.config).num_records > 0)
    serve_until_published(first.engine, first.worker, answers, 2)
    step_both_until(servers, lambda: not first.worker._roster.aligners["t"].unshared)
    command(second.config, "freeze")
    step_both_until(servers, lambda: status(first.config).is_frozen)
    version = first.engine.version("t")
    command(second.config, "rollback")
    step_both_until(servers, lambda: first.engine.version("t") != version)
    command(second.config, "unfreeze")
    step_both_until(servers, lambda: not status(first.config).is_frozen)
    assert has_text_of(first.worker)
    command(second.config, "reset")
    step_both_until(servers, lambda: not has_text_of(first.worker) and first.engine.version("t") == 0)
    assert not list(first.config.state_directory.glob("**/revision-*"))


@pytest.mark.parametrize("action", ["reset", "unfreeze"])
def test_what_another_server_has_not_joined_yet_is_forgotten_with_a_command(
    servers: tuple[Server, Server], answers: list[Answer], action: str
) -> None:
    first, second = servers
    if action == "unfreeze":
        second.engine.serve(answers[:1])
        step_until(second.worker, lambda: status(second.config).num_records > 0)
        command(first.config, "freeze")
        step_both_until(servers, lambda: status(second.config).is_frozen)
        time.sleep(2 * second.config.log.interval_seconds + worker_program._MOST_UNWRITTEN)
    second.engine.serve(answers[:6])
    step_until(second.worker, lambda: second.worker._intake.is_joining)
    second.worker._intake.read()
    command(first.config, action)
    first.worker._tick()
    second.worker._tick()
    assert not second.worker._intake.is_joining


def test_what_was_logged_before_a_reset_is_not_learned_after_it(server: Server, answers: list[Answer]) -> None:
    num_steps = server.engine.serve(answers[:64])
    command(server.config, "reset")
    server.worker._tick()  # it reads nothing
    step_until(server.worker, lambda: status(server.config).num_records == num_steps)
    server.worker._tick()
    assert not has_text_of(server.worker)
    time.sleep(2 * server.config.log.interval_seconds + worker_program._MOST_UNWRITTEN)
    server.engine.serve(answers[64:128])
    step_until(server.worker, lambda: has_text_of(server.worker))


def test_a_restarted_server_has_what_the_servers_have_and_takes_its_own_back_at_all(
    servers: tuple[Server, Server], answers: list[Answer]
) -> None:
    first, second = servers
    second.engine.serve(answers[:2])
    step_until(second.worker, lambda: status(second.config).num_records > 0)
    serve_until_published(first.engine, first.worker, answers, 1)
    step_both_until(servers, lambda: second.engine.version("t") > 0)
    for server in servers:
        server.restart()
        server.engine.serve(answers[:2])
    aligners = [server.worker._roster.aligners for server in servers]
    step_both_until(servers, lambda: all("t" in one and one["t"].revision > 0 for one in aligners))
    assert [one["t"]._is_own for one in aligners] == [True, False]
    for number in range(600):  # the guard of the learner finds it bad
        aligners[0]["t"].count(sampled(first.engine.version("t"), False, f"{number}"), True)
        aligners[0]["t"].count(sampled(0, True, f"base {number}"), True)
    assert aligners[0]["t"].revision == 0
    step_both_until(servers, lambda: second.engine.version("t") == 0)
    first.restart()
    first.engine.serve(answers[:2])
    step_until(first.worker, lambda: first.worker._roster.aligners.get("t") is not None)
    for _ in range(20):
        first.worker.step()
    assert first.engine.version("t") == 0


def test_one_server_learns_a_key_and_another_goes_on_when_it_stops(
    servers: tuple[Server, Server], answers: list[Answer]
) -> None:
    for start in range(0, 64, 16):
        for server in servers:
            server.engine.serve(answers[start : start + 16])
            server.worker.step()
    step_both_until(servers, lambda: any(status(server.config).num_updates for server in servers))
    leader, other = servers if status(servers[0].config).num_updates else servers[::-1]
    deadline = time.monotonic() + 1
    step_until(other.worker, lambda: time.monotonic() > deadline)
    assert status(other.config).num_updates == 0
    leader.worker.close()
    step_until(other.worker, lambda: status(other.config).num_updates > 0)


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture
def layout(draft: TinyDraft, tmp_path: Path, valkey_url: str) -> WeightLayout:
    return adapter_layout(make_config(tmp_path, valkey_url), draft)


def test_a_lease_ends_when_nobody_asks_for_it(valkey_url: str, layout: WeightLayout) -> None:
    Redis.from_url(valkey_url).flushall()
    first, second = (SharedVersions(valkey_url, layout, lease_seconds=1.0) for _ in range(2))
    assert first.leads("t")
    assert not second.leads("t")
    assert second.leads("another key")
    assert first.leads("t")
    time.sleep(1.1)  # as after kill -9
    assert second.leads("t")
    assert not first.leads("t")


def test_leases_that_are_not_asked_for_are_left_out(
    valkey_url: str, layout: WeightLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else there would be one for each tenant that ever was."""
    monkeypatch.setattr(shared_versions, "_MOST_LEASES", 2)
    Redis.from_url(valkey_url).flushall()
    shared = SharedVersions(valkey_url, layout)
    assert all(shared.leads(key) for key in ("a", "b", "a", "c", "a"))
    assert list(shared._leases) == ["c", "a"]


async def test_a_learner_that_is_cut_off_leads_no_more(
    valkey_url: str, layout: WeightLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    Redis.from_url(valkey_url).flushall()
    monkeypatch.setattr(shared_versions, "_TIMEOUT", 0.3)
    async with Proxy(Path(valkey_url.removeprefix("unix://"))).running() as network:
        cut_off = SharedVersions(f"redis://127.0.0.1:{network.port}", layout, lease_seconds=1.0)
        other = SharedVersions(valkey_url, layout, lease_seconds=30.0)
        assert await asyncio.to_thread(cut_off.leads, "t")
        network.cut()
        assert not await asyncio.to_thread(cut_off.leads, "t")
        assert not await asyncio.to_thread(cut_off.publish, "t", None)
        async with asyncio.timeout(60):
            while not other.leads("t"):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        network.mend()  # what the learner sent comes late
        assert not await asyncio.to_thread(cut_off.leads, "t")
        assert other.leads("t")


def test_weights_of_another_draft_are_not_seen_and_damaged_ones_refused(valkey_url: str, layout: WeightLayout) -> None:
    redis = Redis.from_url(valkey_url)
    redis.flushall()
    ours, theirs = SharedVersions(valkey_url, layout), SharedVersions(valkey_url, layout)
    foreign = SharedVersions(valkey_url, WeightLayout(layout.tensors, base="another draft"))
    tensors = {spec.name: torch.randn(spec.shape).to(spec.dtype) for spec in layout.tensors}
    assert foreign.publish("t", tensors)
    assert ours.look("t") == (0, 0, None)
    first = theirs.publish("t", tensors)
    assert first
    assert ours.look("t") == (first, 0, None)
    version = ours.version("t")
    assert version is not None
    assert version.tensors is not None
    assert version.number == first
    assert all(torch.equal(version.tensors[name], tensor) for name, tensor in tensors.items())
    [name] = [key for key in redis.keys("evospec:adapter:*") if layout.fingerprint.hex()[:16].encode() in key]
    for damaged in (b"no weights", redis.hget(name, "weights")[:-8]):  # type: ignore[index]
        redis.hset(name, "weights", damaged)
        assert ours.version("t") == SharedVersion(first, None, fits=False)
    assert theirs.publish("t", {**tensors, next(iter(tensors)): torch.zeros(3)}) == first + 1
    assert ours.version("t") == SharedVersion(first + 1, None, fits=False)
    assert theirs.publish("t", None) == first + 2
    assert ours.version("t") == SharedVersion(first + 2, None)
    assert theirs.freeze("t", True)
    assert ours.look("t") == (first + 2, 0, True)
    reset = theirs.reset("t")
    assert reset
    assert ours.look("t") == (first + 2, reset, False)
    time.sleep(0.01)
    redis.flushall()  # lost: what comes now is taken for nothing that was before
    numbers = theirs.publish("t", None), theirs.reset("t")
    assert numbers[0]
    assert numbers[0] > first + 2
    assert numbers[1]
    assert numbers[1] > reset


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/x"]
)
def test_without_redis_nobody_leads_and_nothing_is_new(url: str, layout: WeightLayout) -> None:
    shared = SharedVersions(url, layout)
    assert not shared.leads("t")
    assert shared.publish("t", None) is None
    assert not shared.freeze("t", True)
    assert shared.reset("t") is None
    assert shared.look("t") is None
    assert shared.version("t") is None
    shared.close()
