"""The worker, ``python -m evospec.adapters.alignment.worker``: learns from the token log, and publishes weights."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.control import ControlChannel
from evospec.adapters.alignment.exchange import exchange, obey
from evospec.adapters.alignment.intake import Intake, Roster
from evospec.adapters.alignment.pace import Pacer, bound_memory, give_back_memory, resident_bytes, yield_to_others
from evospec.adapters.alignment.publisher import AdapterPublisher
from evospec.adapters.alignment.shared_versions import SharedVersions
from evospec.adapters.alignment.store import AdapterStore, claim
from evospec.adapters.alignment.synthetic import AnswerWriter
from evospec.adapters.alignment.taught import TaughtDraft, load_taught
from evospec.adapters.alignment.updates import Updater
from evospec.engine.config import CONFIG_VARIABLE, EngineConfig
from evospec.engine.log import configure_logging_from_environment
from evospec.engine.models.config import ModelError
from evospec.engine.online.adapter_control import AdapterCommand, WorkerStatus

log = structlog.get_logger(__name__)

_TICK = 1.0
_DISK_PATIENCE = 2.0
_MOST_UNWRITTEN = 1.0
"""Seconds that a step waits at most until it is written to the log, and more."""


class AdapterWorker:
    """One draft, many keys. Nobody waits for it, and it may be killed at any time.

    What it holds in memory only (records read and not yet learned, the optimiser's state) is lost then; the text of
    tenants is not worth the disk.

    Args:
        taught: what it teaches.
        directory: where the versions of its keys are, and no other worker's.
        pacer: None: one that follows the draft's ``config.pace``.
        engine_address: of the engine that writes answers while it is idle; empty: none does.
    """

    def __init__(
        self, taught: TaughtDraft, directory: Path, pacer: Pacer | None = None, engine_address: str = ""
    ) -> None:
        self._taught, self._config = taught, taught.config.with_rows_of(taught.row_size)
        config = self._config
        assert config.redis_url is not None
        layout = self._make_updater("").layout
        self._store = AdapterStore(directory, layout)
        self._publisher = AdapterPublisher(config.channel_path, layout, self._store)
        self._control = ControlChannel(config.redis_url, config.log.stream)
        self._shared = SharedVersions(config.redis_url, layout) if config.share_versions else None
        self._pacer = pacer or Pacer(config.pace)
        self._writer = AnswerWriter(engine_address)
        self._roster = Roster(config.num_slots, self._make_aligner, self._let_go)
        self._intake = Intake(taught, config, self._roster, self._writer.remember)
        self._started_at = time.time()
        self._is_paused = False
        self._ticked_at = -_TICK

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Work until told to stop; one round takes as long as an update.

        While its directory cannot be written to, nothing is put in force.
        """
        fails = False
        while not is_stopped():
            try:
                self.step()
                fails = False
            except OSError as error:
                if not fails:
                    log.error("the state directory cannot be written to: it is tried again", reason=str(error))
                fails = True
                time.sleep(_DISK_PATIENCE)
        self._report()

    def step(self) -> None:
        """One round: read, learn, publish, report."""
        has_worked = self._work()
        if not self._read() and not has_worked:
            self._write_answers()
            give_back_memory()
            # Not woken by the next record: on a busy machine every waking takes a core from the engine.
            time.sleep(self._config.log.interval_seconds)
        try:
            if time.monotonic() - self._ticked_at >= _TICK:
                self._ticked_at = time.monotonic()
                self._tick()
        finally:  # what is bad goes, full disk or not
            self._each(self._publish)

    def close(self) -> None:
        """Give back what others may want; all versions are on disk already."""
        self._publisher.close()
        self._intake.close()
        self._control.close()
        self._writer.close()
        if self._shared is not None:
            self._shared.close()

    def _tick(self) -> None:
        if self._publisher.attach():
            for key in self._publisher.slots:
                if self._roster.hear(key, self._control.now()) is None:
                    self._publisher.publish(key, None)  # nobody would watch it
            for aligner in self._roster.aligners.values():
                aligner.is_unpublished = True
        try:
            self._each(self._tick_one)
            while (command := self._control.take()) is not None:
                self._obey(command)
            self._each(lambda aligner: aligner.save() if aligner.is_unsaved else None)
        finally:
            self._report()

    def _tick_one(self, aligner: KeyAligner) -> None:
        aligner.tick()
        self._exchange(aligner)

    def _each(self, act: Callable[[KeyAligner], None]) -> None:
        """Do it for every key. Where the disk fails for one, which is an error, the others still have their turn."""
        failed: OSError | None = None
        for aligner in self._roster.aligners.values():
            try:
                act(aligner)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    def _read(self) -> bool:
        """Take in what the engine logged meanwhile, if the machine allows; whether there was anything."""
        if not self._pacer.may_read():
            return False
        started = time.process_time()
        has_read = self._intake.read()
        self._pacer.took_in(time.process_time() - started)
        return has_read

    def _make_aligner(self, key: str) -> KeyAligner:
        aligner = KeyAligner(key, self._taught.base, self._make_updater(key), self._store, self._config)
        aligner.leads = self._shared is None  # else it asks first
        return aligner

    def _make_updater(self, key: str) -> Updater:
        return self._taught.updater(self._taught.base, self._config, key, self._taught.fingerprint)

    def _let_go(self, key: str, aligner: KeyAligner) -> None:
        """Drop a key; its last good version stays on disk, for when it is wanted again."""
        aligner.save()
        self._forget_text(key)
        self._publisher.publish(key, None)

    def _work(self) -> bool:
        """Update or score a key that wants it, the keys in turn, if the machine allows; whether there was one."""
        is_idle = self._pacer.is_idle()
        for aligner in self._roster.aligners.values():
            aligner.machine_is_idle = is_idle
        all_wanting = (aligner for aligner in self._roster.aligners.values() if aligner.leads and aligner.wants_work)
        wanting = min(all_wanting, key=lambda aligner: aligner.worked_at, default=None)
        self._is_paused = wanting is not None and not (is_idle or self._pacer.may_run())
        if wanting is None or self._is_paused:
            return False
        started = time.process_time()
        wanting.work()
        self._pacer.ran(time.process_time() - started)
        return True

    def _write_answers(self) -> None:
        """Have more to learn from written, where there is nothing else to do, and the last of it is learned from."""
        if not (self._writer.is_writing() or self._intake.is_joining) and self._pacer.is_idle():
            self._writer.write({key for key, aligner in self._roster.aligners.items() if aligner.wants_answers})

    def _publish(self, aligner: KeyAligner) -> None:
        if not aligner.is_unpublished:
            return
        if (version := self._publisher.publish(aligner.state.key, aligner.tensors)) is not None:
            aligner.published(version)

    def _obey(self, command: AdapterCommand) -> None:
        """Carry out a command; where a full disk keeps it from being carried out, it comes again."""
        # A key without a slot obeys too, on disk and at other servers; it gets none by that, since it may be misspelt.
        with_slot = self._roster.aligners.get(command.key)
        aligner = with_slot or self._make_aligner(command.key)
        try:
            self._exchange(aligner)  # what the servers have in force is what is taken back
            obey(aligner, command, self._log_time())
            if with_slot is None:
                aligner.save()
        except OSError:
            self._control.give_back(command)
            raise
        self._exchange(aligner)

    def _exchange(self, aligner: KeyAligner) -> None:
        if self._shared is not None:
            exchange(aligner, self._shared, self._log_time)
        if aligner.joined_after != aligner.state.learns_after:  # what was logged before is not to be learned from
            aligner.joined_after = aligner.state.learns_after
            self._forget_text(aligner.state.key)

    def _forget_text(self, key: str) -> None:
        self._intake.forget(key)
        self._writer.forget(key)

    def _log_time(self) -> float:
        """When what is verified now will be in the log at the latest, by the clock of Redis."""
        return self._control.now() + self._config.log.interval_seconds + _MOST_UNWRITTEN

    def _report(self) -> None:
        worker = WorkerStatus(
            updated_at=time.time(),
            started_at=self._started_at,
            pid=os.getpid(),
            **self._intake.counts(),
            is_attached=self._publisher.is_attached,
            is_paused=self._is_paused,
            resident_bytes=resident_bytes(),
        )
        slots = self._publisher.slots
        self._control.report(worker, {key: a.status(slots.get(key)) for key, a in self._roster.aligners.items()})


def main(updater: type[Updater] = Updater) -> None:
    """Work until SIGTERM, which ends it within an update's time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    configure_logging_from_environment()
    config = EngineConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    torch.set_num_threads(config.alignment.pace.threads)
    bound_memory()
    try:
        taught = load_taught(config, updater)
        directory = claim(config.alignment.state_directory / taught.fingerprint[:16])
        writes = taught.updater.grows and config.alignment.synthetic_answers
        worker = AdapterWorker(taught, directory, engine_address=config.address if writes else "")
    except (ModelError, OSError) as error:
        log.error("the worker cannot start", reason=str(error))
        sys.exit(1)
    yield_to_others(config.alignment.pace.niceness)  # not before: what others have learned is wanted within seconds
    log.info("adapters worker ready", draft=config.speculation.draft)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    worker.run(lambda: bool(stopped))
    worker.close()


if __name__ == "__main__":
    main()
