"""The worker, ``python -m adapters.alignment.worker``: learns from the token log, publishes in the weight channel."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
import torch

from adapters.alignment.aligner import KeyAligner
from adapters.alignment.control import ControlChannel
from adapters.alignment.exchange import exchange, obey
from adapters.alignment.pace import Pacer
from adapters.alignment.process import bound_memory, give_back_memory, resident_bytes, yield_to_others
from adapters.alignment.publisher import AdapterPublisher
from adapters.alignment.records import Assembler
from adapters.alignment.replay import starts_chains, teaches
from adapters.alignment.roster import Roster
from adapters.alignment.shared_versions import SharedVersions
from adapters.alignment.store import AdapterStore, claim
from adapters.alignment.synthetic import AnswerWriter
from adapters.alignment.taught import TaughtDraft, load_taught
from adapters.alignment.updates import Updater
from engine.config import CONFIG_VARIABLE, EngineConfig
from engine.log import configure_logging_from_environment
from engine.models.config import ModelError
from engine.online.adapter_control import AdapterCommand, WorkerStatus, adapter_key
from engine.online.feature_ring import FeatureRingReader
from engine.online.shared_file import SharedMemoryError
from engine.online.token_log import LoggedRecord, TokenLogReader, TokenLogUnavailable
from engine.online.verify_record import VerifyRecord

log = structlog.get_logger(__name__)

_BATCH = 256
_MAX_BATCHES = 16
_TICK = 1.0
_DISK_PATIENCE = 2.0


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
        self._reader = TokenLogReader(config.redis_url, config.log.stream)
        self._control = ControlChannel(config.redis_url, config.log.stream)
        self._shared = SharedVersions(config.redis_url, layout) if config.share_versions else None
        self._pacer = pacer or Pacer(config.pace)
        self._writer = AnswerWriter(engine_address)
        self._ring: FeatureRingReader | None = None
        replay, vocab_size = config.replay, len(taught.base.target.head)
        self._assembler = Assembler(config.log.top_k, vocab_size, replay.segment_positions, replay.context_positions)
        self._roster = Roster(config.num_slots, self._make_aligner, self._let_go)
        self._started_at = time.time()
        self._num_records = self._num_without_slot = 0
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
        if not (self._pacer.may_read() and self._read_all()) and not has_worked:
            self._write_answers()
            give_back_memory()
            # Not woken by the next record: on a busy machine every waking takes a core from the engine.
            time.sleep(self._config.log.interval_seconds)
        if time.monotonic() - self._ticked_at >= _TICK:
            self._ticked_at = time.monotonic()
            self._tick()
        self._publish()

    def close(self) -> None:
        """Give back what others may want; all versions are on disk already."""
        self._publisher.close()
        self._reader.close()
        self._control.close()
        self._writer.close()
        if self._shared is not None:
            self._shared.close()

    def _tick(self) -> None:
        if self._publisher.attach():
            for key in self._publisher.slots:
                if self._roster.hear(key, time.time()) is None:
                    self._publisher.publish(key, None)  # nobody would watch it
            for aligner in self._roster.aligners.values():
                aligner.is_unpublished = True
        for command in self._control.take():
            self._obey(command)
        for aligner in self._roster.aligners.values():
            aligner.tick()
            self._exchange(aligner)
        self._report()

    def _read_all(self) -> bool:
        """Take in what the engine logged meanwhile, or much of it; whether there was anything."""
        started, counts = time.process_time(), [self._read()]
        while counts[-1] == _BATCH and len(counts) < _MAX_BATCHES:
            counts.append(self._read())
        self._pacer.took_in(time.process_time() - started)
        return any(counts)

    def _read(self) -> int:
        """Take in a batch of what the engine logged; none if Redis or the ring is away."""
        try:
            ring = self._open_ring()
            entries = self._reader.read(_BATCH)
            self._take_in(entries, ring)
            self._reader.acknowledge(entries)
        except TokenLogUnavailable:
            self._ring = None
            return 0
        except SharedMemoryError:
            self._ring = None
            self._reader.rewind()
            return 0
        return len(entries)

    def _take_in(self, entries: list[LoggedRecord], ring: FeatureRingReader) -> None:
        config, known, joined = self._config, list[tuple[KeyAligner, VerifyRecord, bool]](), []
        of_keys = [(adapter_key(config.key_scope, each.record.tenant, each.record.domain), each) for each in entries]
        # Those that have a slot go first, or after a quiet minute a newcomer would put out one that is about to speak,
        # that one the next, and so on.
        for key, entry in sorted(of_keys, key=lambda of_key: of_key[0] not in self._roster.aligners):
            record, has_slot = entry.record, self._roster.aligners.get(key)
            aligner = has_slot if record.is_synthetic else self._roster.hear(key, entry.logged_at)
            if aligner is not None:
                if record.is_synthetic:
                    aligner.replay.keep_in_training(record.request_id)
                is_useful = teaches(record, config.log.kl_threshold, config.replay.sampled_share)
                known.append((aligner, record, is_useful))
                is_held_out = aligner.replay.holds_out(record.request_id)
                if entry.logged_at >= aligner.state.learns_after:
                    if not is_held_out:
                        self._writer.remember(key, record)
                    joined.append((key, record, starts_chains(record, is_useful, is_held_out)))
        # The ring goes first, since only that can fail: then nothing was counted, and all comes again.
        segments = self._assembler.add(joined, ring)
        for aligner, record, is_useful in known:
            aligner.count(record, is_useful)
        self._num_records += len(entries)
        self._num_without_slot += len(entries) - len(known)
        for key, segment in segments:
            if key in self._roster.aligners:
                self._roster.aligners[key].add(segment)

    def _open_ring(self) -> FeatureRingReader:
        if self._ring is None:
            ring = FeatureRingReader(path := self._config.ring_path)
            if ring.width != self._taught.row_size:
                raise SharedMemoryError(f"{path}: rows of {ring.width} values are not this draft's input")
            self._ring = ring
        return self._ring

    def _make_aligner(self, key: str) -> KeyAligner:
        aligner = KeyAligner(key, self._taught.base, self._make_updater(key), self._store, self._config)
        aligner.leads = self._shared is None  # else it asks first
        return aligner

    def _make_updater(self, key: str) -> Updater:
        return self._taught.updater(self._taught.base, self._config, key, self._taught.fingerprint)

    def _let_go(self, key: str, aligner: KeyAligner) -> None:
        """Drop a key; its last good version stays on disk, for when it is wanted again."""
        aligner.save()
        self._assembler.forget(key)
        self._writer.forget(key)
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
        if not (self._writer.is_writing() or self._assembler.is_joining) and self._pacer.is_idle():
            self._writer.write({key for key, aligner in self._roster.aligners.items() if aligner.wants_answers})

    def _publish(self) -> None:
        for key, aligner in self._roster.aligners.items():
            if aligner.is_unpublished and (version := self._publisher.publish(key, aligner.tensors)) is not None:
                aligner.published(version)

    def _obey(self, command: AdapterCommand) -> None:
        # A key without a slot obeys too, on disk and at other servers; it gets none by that, since it may be misspelt.
        aligner = self._roster.aligners.get(command.key) or self._make_aligner(command.key)
        self._exchange(aligner)  # what the servers have in force is what is taken back
        obey(aligner, command, self._log_time())
        self._exchange(aligner)
        if command.action in ("reset", "unfreeze"):  # what was logged before is not to be learned from
            self._assembler.forget(command.key)
            self._writer.forget(command.key)

    def _exchange(self, aligner: KeyAligner) -> None:
        if self._shared is not None:
            exchange(aligner, self._shared, self._log_time)

    def _log_time(self) -> float:
        """When what is verified now will be in the log at the latest, by the clock of Redis."""
        return self._control.now() + self._config.log.interval_seconds

    def _report(self) -> None:
        lag: int | None = None
        with suppress(TokenLogUnavailable):
            lag = self._reader.backlog()
        worker = WorkerStatus(
            updated_at=time.time(),
            started_at=self._started_at,
            pid=os.getpid(),
            lag=lag,
            num_records=self._num_records,
            num_lapsed=self._assembler.num_lapsed,
            num_unusable=self._assembler.num_unusable + self._reader.num_rejected,
            num_trimmed=self._reader.num_trimmed,
            num_without_slot=self._num_without_slot,
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
