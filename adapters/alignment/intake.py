"""What the worker takes in of the engine's log, records and segments, and which keys have an aligner to learn it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog

from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.records import Assembler
from evospec.adapters.alignment.replay import starts_chains, teaches
from evospec.adapters.alignment.taught import TaughtDraft
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.online.adapter_control import adapter_key
from evospec.engine.online.feature_ring import FeatureRingReader
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.token_log import LoggedRecord, TokenLogReader, TokenLogUnavailable
from evospec.engine.online.verify_record import VerifyRecord

log = structlog.get_logger(__name__)

_BATCH = 256
_MAX_BATCHES = 16
_IDLE_SECONDS = 60.0


class Roster:
    """The aligners by key. One leaves for a newcomer only when its key was silent for a minute.

    If the one heard of least recently always made room, then of more busy keys than slots each would leave before it
    had learned anything. What counts is when records were logged, not when they are read: after a long scoring all keys
    were silent to the worker.

    Args:
        num_slots: how many aligners there may be at a time.
        make: makes an aligner for a key.
        leave: is told which aligner has left.
    """

    def __init__(
        self, num_slots: int, make: Callable[[str], KeyAligner], leave: Callable[[str, KeyAligner], None]
    ) -> None:
        self._num_slots, self._make, self._leave = num_slots, make, leave
        self.aligners: OrderedDict[str, KeyAligner] = OrderedDict()  # least recently heard of first
        self._heard_at: dict[str, float] = {}
        self._has_warned = False

    def hear(self, key: str, at: float) -> KeyAligner | None:
        """The aligner of a key that was heard of ``at`` seconds of the epoch; None: there is no room for one."""
        if key not in self.aligners:
            if problem := self._make_room(at):
                if not self._has_warned:
                    log.warning("an adapter key has no slot, records are left out", key=key, reason=problem)
                    self._has_warned = True
                return None
            self._has_warned = False
            self.aligners[key] = self._make(key)
        self.aligners.move_to_end(key)
        self._heard_at[key] = max(at, self._heard_at.get(key, at))  # records of a batch may be told twice
        return self.aligners[key]

    def _make_room(self, now: float) -> str:
        """Have a slot free for another key; why none can be, "": one is."""
        if len(self.aligners) < self._num_slots:
            return ""
        key = next(iter(self.aligners))
        if now - self._heard_at[key] < _IDLE_SECONDS:
            return "more busy keys than slots"
        try:
            self._leave(key, self.aligners[key])  # first: where the disk is full, it stays
        except OSError as error:
            return str(error)
        del self.aligners[key], self._heard_at[key]
        return ""


class Intake:
    """Reads log and ring, either of which may be away.

    Args:
        taught: whose features are in the ring.
        config: of the adapters.
        roster: gives a key an aligner, if there is room for one.
        remember: is told of the records whose prompts may be asked again, each with its key.
    """

    def __init__(
        self,
        taught: TaughtDraft,
        config: AdaptersConfig,
        roster: Roster,
        remember: Callable[[str, VerifyRecord], None],
    ) -> None:
        assert config.redis_url is not None
        self._config, self._roster, self._remember = config, roster, remember
        self._row_size, target = taught.row_size, taught.base.target
        self._reader = TokenLogReader(config.redis_url, config.log.stream)
        self._ring: FeatureRingReader | None = None
        self._assembler = Assembler(config.replay, config.log.top_k, len(target.head), target.max_positions)
        self._num_records = self._num_without_slot = 0

    @property
    def is_joining(self) -> bool:
        """Whether a request's records are here that may not be all."""
        return self._assembler.is_joining

    def read(self) -> bool:
        """Take in what the engine logged meanwhile, or much of it; whether there was anything."""
        counts = [self._read_batch()]
        while counts[-1] == _BATCH and len(counts) < _MAX_BATCHES:
            counts.append(self._read_batch())
        return any(counts)

    def forget(self, key: str) -> None:
        """Drop what was not joined yet of a key."""
        self._assembler.forget(key)

    def counts(self) -> dict[str, Any]:
        """Fields of ``WorkerStatus``."""
        lag: int | None = None
        with suppress(TokenLogUnavailable):
            lag = self._reader.backlog()
        return {
            "lag": lag,
            "num_records": self._num_records,
            "num_lapsed": self._assembler.num_lapsed,
            "num_unusable": self._assembler.num_unusable + self._reader.num_rejected,
            "num_trimmed": self._reader.num_trimmed,
            "num_without_slot": self._num_without_slot,
        }

    def close(self) -> None:
        """Let another worker read on from here."""
        self._reader.close()

    def _read_batch(self) -> int:
        """Take in a batch of records; none if Redis or the ring is away."""
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

    def _take_in(self, entries: Sequence[LoggedRecord], ring: FeatureRingReader) -> None:
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
                        self._remember(key, record)
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
            if ring.width != self._row_size:
                raise SharedMemoryError(f"{path}: rows of {ring.width} values are not this draft's input")
            self._ring = ring
        return self._ring
