"""The adapters worker while its directory cannot be written to: nobody's records and no command are lost by that."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from evospec.adapters.alignment import store as store_module
from evospec.adapters.alignment import worker as worker_program
from evospec.adapters.alignment.worker import AdapterWorker
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.online.token_log import LoggedRecord
from tests.drifting_traffic import Answer, DriftingTraffic, MadeUpEngine, TinyDraft
from tests.integration.test_adapter_worker import (
    command,
    eager_worker,
    make_config,
    make_store,
    serve_until_known,
    serve_until_published,
    status,
    statuses,
    step_until,
    wait_until_written,
)


@pytest.fixture(autouse=True)
def _is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take commands and report ten times a second, and try a full disk again at once."""
    monkeypatch.setattr(worker_program, "_TICK", 0.1)
    monkeypatch.setattr(worker_program, "_DISK_PATIENCE", 0.01)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return TinyDraft.make(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def answers(draft: TinyDraft) -> list[Answer]:
    return DriftingTraffic(draft.drafter).answers(192)


@pytest.fixture
def config(tmp_path: Path, valkey_url: str) -> AdaptersConfig:
    return make_config(tmp_path, valkey_url)


@contextmanager
def full_disk(of: str = "*") -> Iterator[list[Path]]:
    """Files of these names cannot be written meanwhile; those that were to be are in the list."""
    failures: list[Path] = []
    write = store_module._write

    def fail(path: Path, content: bytes) -> None:
        if not path.match(of):
            write(path, content)
            return
        failures.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as full:
        full.setattr(store_module, "_write", fail)
        yield failures


def run_until(worker: AdapterWorker, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds

    def is_met() -> bool:
        assert time.monotonic() < deadline, "it took too long"
        return condition()

    worker.run(is_met)


def run_rounds(worker: AdapterWorker, count: int) -> None:
    for _ in range(count):
        with suppress(OSError):
            worker.step()


def num_records(config: AdaptersConfig) -> int:
    worker = statuses(config)[0]
    assert worker is not None
    return worker.num_records


def test_it_ends_no_worker(config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]) -> None:
    """What cannot be kept is not put in force, until it can."""
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    with full_disk() as failures:
        engine.serve(answers[:64])
        worker.run(lambda: len(failures) > 3)
        assert engine.version("t") == 0
    serve_until_published(engine, worker, answers, 1)
    worker.close()


def test_what_is_in_force_goes_all_the_same(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though in every step something else fails."""
    monkeypatch.setattr(worker_program, "_TICK", 0.0)
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_published(engine, worker, answers, 1)
    with full_disk():
        command(config, "reset")
        command(config, "freeze", "other")
        run_until(worker, lambda: engine.version("t") == 0)
    worker.close()


def test_what_is_in_force_goes_though_another_key_has_a_version_that_cannot_be_put_in_force(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]
) -> None:
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_known(config, engine, worker, answers[:2], "other")
    serve_until_published(engine, worker, answers, 1)
    command(config, "freeze")
    run_until(worker, lambda: status(config).is_frozen)
    assert engine.version("t")
    with full_disk(of="channel.json") as failures:
        for start in range(0, 160, 16):
            engine.serve(answers[start : start + 16], "other")
            run_rounds(worker, 14)
            if status(config, "other").revision:
                break
        engine.serve(answers[:1])  # heard of last, it comes behind the other
        num_failures = len(failures)
        run_until(worker, lambda: len(failures) > num_failures + 3)
        command(config, "reset")
        run_until(worker, lambda: engine.version("t") == 0)
    worker.close()


def test_a_key_that_cannot_be_stored_keeps_its_slot_and_no_record_from_the_others(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two would give its slot to a newcomer, which is left out."""
    now = [0.0]
    monkeypatch.setattr(LoggedRecord, "logged_at", property(lambda _: now[0]))
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    before = sum(engine.serve(answers[:2], tenant) for tenant in ("silent", "busy"))
    wait_until_written(engine, before)
    step_until(worker, lambda: set(statuses(config)[1]) == {"silent", "busy"})
    step_until(worker, lambda: num_records(config) == before)
    num_of_busy = status(config, "busy").num_records
    now[0] += 61.0
    num_new, num_busy = engine.serve(answers[:1], "newcomer"), engine.serve(answers[:1], "busy")
    wait_until_written(engine, before + num_new + num_busy)
    with full_disk() as failures:
        run_until(worker, lambda: num_records(config) == before + num_new + num_busy)
        assert failures
        found, adapters = statuses(config)
    assert found is not None
    assert found.num_without_slot == num_new
    assert set(adapters) == {"silent", "busy"}
    assert adapters["busy"].num_records == num_of_busy + num_busy
    worker.close()


def test_commands_for_a_key_without_slot_wait_for_room(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]
) -> None:
    """And the worker reports meanwhile. Those that came later are not carried out before, nor lost."""
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_known(config, engine, worker, answers[:2], "t")
    with full_disk() as failures:
        for action in ("freeze", "unfreeze", "freeze"):
            command(config, action, "other")
        command(config, "freeze")
        run_until(worker, lambda: len(failures) > 3)
        reported = statuses(config)[0]
        assert reported is not None
        run_until(worker, lambda: statuses(config)[0].updated_at > reported.updated_at)  # type: ignore[union-attr]
    run_until(worker, lambda: status(config).is_frozen)
    assert make_store(config, draft).load_state("other").is_frozen
    worker.close()


def test_commands_for_a_key_with_slot_are_carried_out_once_and_kept_when_there_is_room(
    config: AdaptersConfig, draft: TinyDraft, answers: list[Answer]
) -> None:
    engine, worker = MadeUpEngine(config, draft.drafter, draft.base), eager_worker(config, draft)
    serve_until_published(engine, worker, answers, 2)
    with full_disk() as failures:
        command(config, "freeze")
        command(config, "rollback")
        run_until(worker, lambda: status(config).num_rolled_back > 0)
        num_failures = len(failures)
        run_until(worker, lambda: len(failures) > num_failures + 3)
        assert status(config).is_frozen
    run_until(worker, lambda: make_store(config, draft).load_state("t").num_rolled_back > 0)
    kept = make_store(config, draft).load_state("t")
    assert (kept.is_frozen, kept.num_rolled_back) == (True, 1)
    worker.close()
