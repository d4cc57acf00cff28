"""The adapters worker with a real Valkey, shared memory and processes; the draft is tiny, the engine made up."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from redis import Redis

from evospec.adapters.alignment import worker as worker_program
from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.pace import Pacer
from evospec.adapters.alignment.records import Assembler
from evospec.adapters.alignment.store import AdapterStore
from evospec.adapters.alignment.taught import TaughtDraft
from evospec.adapters.alignment.worker import AdapterWorker
from evospec.engine.adapters_config import (
    AdaptersConfig,
    GuardConfig,
    PaceConfig,
    ReplayConfig,
    TokenLogConfig,
    TrainingConfig,
)
from evospec.engine.config import CONFIG_VARIABLE, EngineConfig, ModelConfig, SpeculationConfig
from evospec.engine.models.lora import lora_layout
from evospec.engine.online.adapter_control import (
    AdapterCommand,
    AdapterStatus,
    WorkerStatus,
    commands_key,
    decode_status,
    status_key,
)
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.token_log import LoggedRecord
from evospec.engine.online.weight_layout import WeightLayout
from tests.drifting_traffic import Answer, DriftingTraffic, MadeUpEngine, TinyDraft
from tests.integration.test_token_log import Valkey
from tests.killable_processes import processes

KILLS = 3


@pytest.fixture(autouse=True)
def _ticks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take commands, exchange versions and report ten times a second, where once is enough otherwise."""
    monkeypatch.setattr(worker_program, "_TICK", 0.1)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return TinyDraft.make(tmp_path_factory.mktemp("alignment"))


@pytest.fixture(scope="module")
def answers(draft: TinyDraft) -> list[Answer]:
    """Of one target. The last 32 are never served, only measured."""
    return DriftingTraffic(draft.drafter).answers(192)


@pytest.fixture
def config(tmp_path: Path, valkey_url: str) -> Iterator[AdaptersConfig]:
    config = make_config(tmp_path, valkey_url)
    yield config
    Redis.from_url(valkey_url).delete(config.log.stream, status_key(config.log.stream), commands_key(config.log.stream))


def make_config(directory: Path, url: str) -> AdaptersConfig:
    """A worker that is quick to learn and to judge."""
    return AdaptersConfig(
        enabled=True,
        redis_url=url,
        share_versions=False,
        rank=8,
        num_slots=2,
        shared_directory=directory / "shm",
        state_directory=directory / "state",
        log=TokenLogConfig(stream=f"log:{directory.name}", top_k=8, ring_rows=16384, interval_seconds=0.05),
        training=TrainingConfig(learning_rate=3e-3, batch_positions=64, updates_per_version=8),
        replay=ReplayConfig(segment_positions=40, context_positions=8),
        guard=GuardConfig(min_held_out=48, min_watched=32, watched_records=256),
        pace=PaceConfig(step_seconds=10.0),
    )


def eager_worker(config: AdaptersConfig, draft: TinyDraft) -> AdapterWorker:
    """One that takes the machine, whoever else wants it."""
    pacer = Pacer(config.pace, spare_cores=lambda: 99.0)
    return AdapterWorker(TaughtDraft(config, draft.drafter, draft.base), config.state_directory, pacer)


def step_until(worker: AdapterWorker, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        worker.step()


def status(config: AdaptersConfig, key: str = "t") -> AdapterStatus:
    return statuses(config)[1].get(key, AdapterStatus())


def statuses(config: AdaptersConfig) -> tuple[WorkerStatus | None, dict[str, AdapterStatus]]:
    assert config.redis_url is not None
    return decode_status(Redis.from_url(config.redis_url).hgetall(status_key(config.log.stream)))  # type: ignore[arg-type]


def command(config: AdaptersConfig, action: str, key: str = "t") -> None:
    assert config.redis_url is not None
    message = AdapterCommand(action=action, key=key)  # type: ignore[arg-type]
    Redis.from_url(config.redis_url).rpush(commands_key(config.log.stream), msgspec.msgpack.encode(message))


def serve_until_published(engine: MadeUpEngine, worker: AdapterWorker, answers: list[Answer], count: int) -> None:
    """Serve, a few requests of each lot without adapter, until the tenant's adapter was published so often."""
    seen = {engine.version("t")}
    for start in range(0, 160, 16):
        if len(seen) > count:
            return
        engine.serve(answers[start : start + 14])
        engine.serve(answers[start + 14 : start + 16], is_control=True)
        for _ in range(14):
            worker.step()
            seen.add(engine.version("t"))
    assert len(seen) > count, f"versions {seen}"


def serve_until_good(
    config: AdaptersConfig, engine: MadeUpEngine, worker: AdapterWorker, answers: list[Answer]
) -> None:
    """Serve until a version of the tenant's adapter has proved itself: the first few may follow each other too fast."""
    for start in [*range(0, 160, 16)] * 5:
        engine.serve(answers[start : start + 14])
        engine.serve(answers[start + 14 : start + 16], is_control=True)
        for _ in range(14):
            worker.step()
        if status(config).good_revision > 0:
            return
    raise AssertionError("no version has proved itself")


def test_draft_follows_the_target(config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]) -> None:
    """Acceptance on answers never served rises with the versions published; none is taken back."""
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    before = engine.acceptance(answers[160:])
    serve_until_published(engine, worker, answers, 3)
    after = engine.acceptance(answers[160:])
    assert after > 1.3 * before
    assert status(config).num_rolled_back == 0
    found, _ = statuses(config)
    assert found is not None
    assert (found.num_lapsed, found.num_unusable, found.is_attached) == (0, 0, True)
    worker.close()


def test_restarts_go_on_from_the_last_good_version(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]
) -> None:
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_good(config, engine, worker, answers)
    worker.close()
    good, version = make_store(config, draft).load_state("t").good_revision, engine.version("t")
    assert good > 0
    worker = eager_worker(config, draft)
    step_until(worker, lambda: engine.version("t") > version and status(config).revision == good)
    aligned, version = engine.acceptance(answers[160:]), engine.version("t")
    # An engine that lost its memory, and one that took it over.
    config.channel_path.unlink()
    engine = MadeUpEngine(config, draft.drafter, draft.base)
    assert engine.version("t") == 0
    step_until(worker, lambda: engine.version("t") > version)
    assert engine.acceptance(answers[160:]) == aligned
    engine = MadeUpEngine(config, draft.drafter, draft.base)
    assert engine.acceptance(answers[160:]) == aligned
    num_updates = status(config).num_updates
    engine.serve(answers[:32])
    step_until(worker, lambda: status(config).num_updates > num_updates)
    worker.close()


def test_noise_is_never_published(config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]) -> None:
    """2,500 records whose distributions belong to other tokens: what is learned from them never serves."""
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    noise = [
        dataclasses.replace(
            answer, top_ids=(answer.top_ids[order] * 7 + 13 * index) % 512, token_ids=answer.token_ids.flip(0)
        )
        for index, answer in enumerate(answers[:112])
    ]
    for start in range(0, 112, 14):
        engine.serve(noise[start : start + 14])
        for _ in range(14):
            worker.step()
    step_until(worker, lambda: status(config).num_records > 2500)
    step_until(worker, lambda: status(config).num_updates >= 32)  # what it reports is up to a second old
    assert (status(config).num_published, engine.version("t")) == (0, 0)
    worker.close()


def test_poisoned_version_is_taken_back(config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]) -> None:
    """Random weights past the offline check are gone after at most 300 records of theirs, and stay in quarantine."""
    store = make_store(config, draft)
    state = store.load_state("t")
    weights = {t.name: torch.randn(t.shape).to(t.dtype) for t in adapter_layout(config, draft).tensors}
    state.good_revision = store.save(state, weights)
    store.save_state(state)
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    normal = engine.acceptance(answers[160:])
    num_logged = engine.serve(answers[:1])
    step_until(worker, lambda: engine.version("t") > 0)
    assert engine.acceptance(answers[160:]) < 0.5 * normal
    num_records = 0
    while engine.version("t") and num_records <= 300:
        served = engine.serve([answers[num_records % 160]])
        num_records += served
        num_logged += served + engine.serve([answers[(num_records + 1) % 160]], is_control=True)
        wait_until_written(engine, num_logged)  # it is sent by the clock
        for _ in range(2):
            worker.step()
    assert num_records <= 300
    assert engine.acceptance(answers[160:]) == normal
    step_until(worker, lambda: status(config).num_rolled_back == 1)
    assert (status(config).revision, status(config).good_revision) == (0, 0)
    assert [path.name for path in store_files(config, "quarantine/*")] == ["revision-1.safetensors"]
    worker.close()


def adapter_layout(config: AdaptersConfig, draft: TinyDraft) -> WeightLayout:
    return lora_layout(draft.drafter.draft.config, config.rank, config.targets, draft.base)


def make_store(config: AdaptersConfig, draft: TinyDraft) -> AdapterStore:
    return AdapterStore(config.state_directory, adapter_layout(config, draft))


def store_files(config: AdaptersConfig, pattern: str) -> list[Path]:
    return list(config.state_directory.glob(f"*/{pattern}"))


def test_operators_are_obeyed(config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]) -> None:
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_published(engine, worker, answers, 2)
    command(config, "freeze")
    step_until(worker, lambda: status(config).is_frozen)
    frozen = status(config)
    engine.serve(answers[:32])
    for _ in range(20):
        worker.step()
    assert status(config).num_updates == frozen.num_updates
    command(config, "rollback")
    step_until(worker, lambda: status(config).revision < frozen.revision)
    command(config, "reset")
    step_until(worker, lambda: status(config).num_updates == 0 and engine.version("t") == 0)
    assert not status(config).is_frozen
    assert store_files(config, "*.safetensors") == []
    worker.close()


@pytest.fixture
def log_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only entry is the time at which records count as logged."""
    now = [0.0]
    monkeypatch.setattr(LoggedRecord, "logged_at", property(lambda _: now[0]))
    return now


def serve_until_known(
    config: AdaptersConfig, engine: MadeUpEngine, worker: AdapterWorker, answers: list[Answer], tenant: str
) -> None:
    engine.serve(answers, tenant)
    step_until(worker, lambda: tenant in statuses(config)[1])


def test_keys_without_a_slot_give_way_and_return(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer], log_clock: list[float]
) -> None:
    """Three tenants, two slots: one not heard of for long is swapped to disk, and comes back as it was."""
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_good(config, engine, worker, answers)
    for tenant in ("second", "third"):
        log_clock[0] += 61.0
        serve_until_known(config, engine, worker, answers[:2], tenant)
    step_until(worker, lambda: "t" not in statuses(config)[1])
    assert engine.version("t") == 0
    good = make_store(config, draft).load_state("t").good_revision
    assert good > 0
    log_clock[0] += 61.0
    engine.serve(answers[:2])
    step_until(worker, lambda: engine.version("t") > 0)
    step_until(worker, lambda: status(config).revision == good)
    assert engine.version("second") == engine.version("third") == 0
    worker.close()


def test_of_more_busy_keys_than_slots_some_keep_learning(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]
) -> None:
    """Three tenants in turn, two slots: the first two have them, and nobody leaves."""
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    num_records = 0
    for start in range(0, 60, 4):
        for tenant in ("first", "second", "third"):
            num_records += engine.serve(answers[start : start + 4], tenant)
        for _ in range(4):
            worker.step()
        assert set(statuses(config)[1]) <= {"first", "second"}
    assert num_records > 300
    step_until(worker, lambda: statuses(config)[0].num_records == num_records)  # type: ignore[union-attr]
    for tenant in ("first", "second"):
        assert status(config, tenant).num_records > 100
        assert status(config, tenant).num_updates > 0
    assert statuses(config)[0].num_without_slot > 100  # type: ignore[union-attr]
    command(config, "freeze", "third")
    step_until(worker, lambda: make_store(config, draft).load_state("third").is_frozen)
    worker.close()


def test_after_a_quiet_minute_keys_that_speak_again_keep_their_slots(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer], log_clock: list[float]
) -> None:
    """A newcomer is the first to speak, the two that have slots right after it."""
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    num_before = sum(engine.serve(answers[:2], tenant) for tenant in ("first", "second"))
    wait_for(lambda: engine.log.stats.num_written == num_before)
    step_until(worker, lambda: set(statuses(config)[1]) == {"first", "second"})
    step_until(worker, lambda: statuses(config)[0].num_records == num_before)  # type: ignore[union-attr]
    log_clock[0] += 61.0
    num_records = sum(engine.serve(answers[:1], tenant) for tenant in ("third", "first", "second"))
    assert num_records < 256, "they are read together"
    wait_for(lambda: engine.log.stats.num_written == num_before + num_records)
    step_until(worker, lambda: statuses(config)[0].num_records == num_before + num_records)  # type: ignore[union-attr]
    assert set(statuses(config)[1]) == {"first", "second"}
    worker.close()


def test_commands_for_a_key_nobody_has_heard_of_take_no_slot(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]
) -> None:
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_known(config, engine, worker, answers[:2], "t")
    command(config, "freeze", "misspelt")
    step_until(worker, lambda: make_store(config, draft).load_state("misspelt").is_frozen)
    for _ in range(3):
        worker.step()
    assert set(statuses(config)[1]) == {"t"}
    worker.close()


def test_log_is_read_to_its_end_however_much_there_is_to_learn(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    monkeypatch.setattr(KeyAligner, "wants_work", True)
    monkeypatch.setattr(KeyAligner, "work", lambda _: None)
    num_records = 0
    while num_records < 2000:
        num_records += engine.serve(answers[:8])
    wait_for(lambda: engine.log.stats.num_written == num_records)
    worker.step()
    found = statuses(config)[0]
    assert found is not None
    assert (found.lag, found.num_records) == (0, num_records)
    worker.close()


def test_records_are_read_again_where_the_ring_failed(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    add, failures = Assembler.add, [SharedMemoryError("a test"), SharedMemoryError("a test")]

    def add_or_fail(self: Assembler, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return add(self, *arguments)

    monkeypatch.setattr(Assembler, "add", add_or_fail)
    num_records = engine.serve(answers[:16])
    assert num_records > 256
    wait_for(lambda: engine.log.stats.num_written == num_records)
    step_until(worker, lambda: status(config).num_records >= num_records, seconds=20)
    for _ in range(3):
        worker.step()
    assert status(config).num_records == num_records
    assert failures == []
    worker.close()


def test_redis_may_go_and_return(tmp_path: Path, draft: TinyDraft, answers: list[Answer]) -> None:
    """It comes back empty; the worker goes on with the new stream."""
    valkey = Valkey(tmp_path)
    valkey.start()
    config = make_config(tmp_path, valkey.url)
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_published(engine, worker, answers, 1)
    valkey.kill()
    for _ in range(5):
        worker.step()
    valkey.start()
    serve_until_published(engine, worker, answers[64:160] + answers[:64], 2)
    step_until(worker, lambda: status(config).revision > 0)
    worker.close()
    valkey.kill()


def test_killed_workers_leave_whole_versions(config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]) -> None:
    """Workers are killed while they publish. What the engine reads is whole, versions grow, the next one goes on."""
    engine = MadeUpEngine(config, draft.drafter, draft.base)
    versions, chance, start = [0], random.Random(0), 0
    for _ in range(KILLS):
        process = launch(config, draft)
        deadline = time.monotonic() + 60
        while engine.channel.poll() == versions[-1] or chance.random() < 0.5:
            assert time.monotonic() < deadline
            engine.serve(answers[start : start + 6])  # with what is in the channel; raises if that is not whole
            start = (start + 6) % 160
            time.sleep(0.1 * chance.random())
        process.kill()
        process.join()
        versions.append(engine.channel.poll())
    assert versions == sorted(set(versions))
    assert len([path for path in store_files(config, "revision-*") if path.suffix == ".safetensors"]) <= 3
    process = launch(config, draft)
    # It may have to learn first: those killed before their version was watched have left none.
    wait_for(lambda: engine.serve(answers[:6]) > 0 and engine.channel.poll() > versions[-1])
    wait_for(lambda: statuses(config)[0].pid == process.pid)  # type: ignore[union-attr]
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


def launch(config: AdaptersConfig, draft: TinyDraft) -> BaseProcess:
    pace = PaceConfig(niceness=0, spare_cores=0.0, step_seconds=10.0)
    whole = EngineConfig(
        model=ModelConfig(name=str(draft.model)),
        speculation=SpeculationConfig(method="eagle3", draft=str(draft.directory)),
        alignment=config.model_copy(update={"pace": pace}),
    )
    process = processes.Process(target=work, args=(whole.model_dump_json(),))
    process.start()
    return process


def work(config: str) -> None:
    """In a process of its own."""
    os.environ[CONFIG_VARIABLE] = config
    worker_program.main()


def wait_until_written(engine: MadeUpEngine, num_records: int) -> None:
    wait_for(lambda: engine.log.stats.num_written >= num_records)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
