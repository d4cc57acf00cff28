"""The token log: verify steps on their way from the engine to the worker, through a Redis stream.

The engine never waits for it: a record that finds the queue full, or Redis down, is dropped and counted. The worker
gets each record at least once (``TokenLogReader``). Imports no torch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
from redis.exceptions import ResponseError

from evospec.engine.online.verify_record import RecordError, VerifyRecord, decode_record, encode_record
from evospec.engine.redis_clients import REDIS_FAILURES, connect

log = structlog.get_logger(__name__)

_FIELD = b"record"
_GROUP, _CONSUMER = "adapters", "worker"
_WRITE_TIMEOUT = 1.0
_READ_TIMEOUT = 2.0
_LOOK_INTERVAL = 0.1
_RETRY_INTERVAL = 0.5
_LIFETIME = 3600
"""Seconds that the log is kept after the last record: it is text of tenants."""
_BATCH_SIZE = 64
_APPEND = """
    for number = 4, #ARGV do
        redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', ARGV[3], ARGV[number])
    end
    redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
"""Appends records, the fourth argument and those after it: one call, since the client packs each call in Python."""

_Entry = tuple[bytes, dict[bytes, bytes] | None]  # None, or no fields: it was trimmed


@dataclass(slots=True)
class TokenLogStats:
    """Records since the start, each in one of the three, in the queue, or just being sent.

    Those dropped by Redis may have been written where it failed before it could answer.
    """

    num_written: int = 0
    num_dropped_by_queue: int = 0
    num_dropped_by_redis: int = 0


class TokenLog:
    """The engine's end of the token log.

    Args:
        url: of Redis or Valkey.
        stream: key of the stream.
        queue_size: records that may wait for the writer thread.
        max_records: about how many records the stream keeps, the newest, of half to one KB each.
        interval: seconds that fewer records than a batch wait: of few, the call costs more than the records.
    """

    def __init__(
        self, url: str, stream: str, queue_size: int = 4096, max_records: int = 8192, interval: float = 0.2
    ) -> None:
        self._redis = connect(url, _WRITE_TIMEOUT)
        self._stream, self._interval = stream, interval
        self._queue_size, self._max_records = queue_size, max_records
        self._queue: deque[bytes] = deque()
        self.stats = TokenLogStats()
        """Each counter is written by one thread only, and readable from any."""
        self._is_down = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="token-log", daemon=True)
        self._thread.start()

    def log(self, record: VerifyRecord) -> None:
        """Queue a record, or drop it. Takes microseconds: no lock, no system call."""
        if len(self._queue) >= self._queue_size:
            self.stats.num_dropped_by_queue += 1
        else:
            self._queue.append(encode_record(record))

    def close(self) -> None:
        """Write what is queued, if Redis answers, and end the thread: seconds at most."""
        self._closing.set()
        self._thread.join()
        self._redis.close()

    def _run(self) -> None:
        # It looks at the queue by the clock, since being woken would cost the engine a lock for each record.
        flushed_at = time.monotonic()
        while not self._closing.wait(min(self._interval, _LOOK_INTERVAL)):
            if len(self._queue) >= _BATCH_SIZE or time.monotonic() - flushed_at >= self._interval:
                self._flush()
                flushed_at = time.monotonic()
        self._flush()

    def _flush(self) -> None:
        """Send what is queued, each batch once: sending again could write records twice."""
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_SIZE))]
            try:
                self._redis.eval(_APPEND, 1, self._stream, self._max_records, _LIFETIME, _FIELD, *batch)
            except REDIS_FAILURES as error:
                self.stats.num_dropped_by_redis += len(batch)
                if not self._is_down:
                    log.warning("token log cannot be written", error=str(error) or type(error).__name__)
                self._is_down = True
                self._closing.wait(_RETRY_INTERVAL)
                return
            self.stats.num_written += len(batch)
            if self._is_down:
                log.info("token log is written again")
            self._is_down = False


class TokenLogUnavailable(Exception):
    """Redis did not answer. Later calls go on where this one failed."""


class LoggedRecord(NamedTuple):
    """A record and its id in the stream."""

    entry_id: bytes
    record: VerifyRecord

    @property
    def logged_at(self) -> float:
        """Seconds of the epoch, by the clock of Redis."""
        return _order(self.entry_id)[0] / 1000


class TokenLogReader:
    """The worker's end of the token log: a consumer of a group, which remembers what was read and not yet acknowledged.

    A reader first gets what the one before it got and did not acknowledge.

    Args:
        url, stream: as in ``TokenLog``. One process at a time may read a stream.
    """

    def __init__(self, url: str, stream: str) -> None:
        self._redis = connect(url, _READ_TIMEOUT)
        self._stream = stream
        self._last_id = b"0-0"
        self._has_pending = True
        self._to_acknowledge: list[bytes] = []
        self._newest: tuple[int, ...] | None = None
        """Id of the newest record that was given to the group; None: not known yet."""
        self._num_passed: int | None = None
        """Records that the group has passed, by our count; Redis counts those, too, that were trimmed before it came to
        them. None: it did not say yet how many there were at first."""
        self.num_trimmed = 0
        """Records that left the stream before they were read, or before they were read again."""
        self.num_rejected = 0
        """Records of another format."""

    def read(self, max_records: int) -> list[LoggedRecord]:
        """The next records, oldest first, at most so many; none if there are none yet.

        Raises:
            TokenLogUnavailable: Redis did not answer. What it delivered without our knowledge comes first next time.
        """
        try:
            if self._newest is None:
                self._find_place()
            if self._has_pending:
                entries = self._read_group(self._last_id, max_records)
                if entries:
                    return self._decode(entries)
                self._has_pending = False
            return self._decode(self._read_group(b">", max_records))
        except REDIS_FAILURES as error:
            self._has_pending = True
            raise TokenLogUnavailable(str(error)) from error

    def rewind(self) -> None:
        """Read again, from the next call on, whatever is not acknowledged."""
        self._last_id, self._has_pending = b"0-0", True

    def acknowledge(self, records: Sequence[LoggedRecord]) -> None:
        """Say that these records are done with and need not be read again.

        Raises:
            TokenLogUnavailable: Redis did not answer; the next call does it.
        """
        self._to_acknowledge += [entry_id for entry_id, _ in records]
        if not self._to_acknowledge:
            return
        try:
            self._redis.xack(self._stream, _GROUP, *self._to_acknowledge)
        except REDIS_FAILURES as error:
            raise TokenLogUnavailable(str(error)) from error
        self._to_acknowledge.clear()

    def backlog(self) -> int:
        """Records in the stream that this group has not read yet; raises ``TokenLogUnavailable``.

        Counts what was trimmed before it was read, too.
        """
        try:
            group = self._state()
        except REDIS_FAILURES as error:
            raise TokenLogUnavailable(str(error)) from error
        if group is None:
            return 0
        if not self._has_pending:  # else some were given to us that we have not seen
            num_passed: int | None = group.get("entries-read")
            if num_passed is not None and self._num_passed is not None:
                self.num_trimmed += max(0, num_passed - self._num_passed)
            self._num_passed = num_passed
        return group["lag"] or 0

    def close(self) -> None:
        """Close the connection; what is not acknowledged stays for the next reader."""
        self._redis.close()

    def _state(self) -> dict[str, Any] | None:
        """The group's state as Redis has it; None: there is no group yet."""
        try:
            groups: list[dict[str, Any]] = self._redis.xinfo_groups(self._stream)
        except ResponseError as error:
            if "no such key" not in str(error):
                raise
            return None
        return next((group for group in groups if group["name"] == _GROUP.encode()), None)

    def _find_place(self) -> None:
        """Where the reader before this one was."""
        group = self._state()
        self._newest = (0, 0) if group is None else _order(group["last-delivered-id"])
        self._num_passed = None if group is None else group.get("entries-read")

    def _read_group(self, start: bytes, count: int) -> list[_Entry]:
        try:
            reply: Any = self._redis.xreadgroup(_GROUP, _CONSUMER, {self._stream: start}, count=count)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            # The first start, or Redis came back empty.
            self._redis.xgroup_create(self._stream, _GROUP, id="0", mkstream=True)
            self._last_id, self._newest, self._num_passed = b"0-0", (0, 0), None
            return []
        entries: list[_Entry] = reply[0][1] if reply else []
        return entries

    def _decode(self, entries: list[_Entry]) -> list[LoggedRecord]:
        records = []
        for entry_id, fields in entries:
            self._last_id = entry_id
            if self._newest is None or _order(entry_id) > self._newest:
                self._newest = _order(entry_id)
                if self._num_passed is not None:
                    self._num_passed += 1
            if entry_id in self._to_acknowledge:
                continue  # done with, as Redis could not be told yet
            if not fields:
                self.num_trimmed += 1
                self._to_acknowledge.append(entry_id)
                continue
            try:
                records.append(LoggedRecord(entry_id, decode_record(fields.get(_FIELD, b""))))
            except RecordError:
                self.num_rejected += 1
                self._to_acknowledge.append(entry_id)
        return records


def _order(entry_id: bytes) -> tuple[int, ...]:
    """A key to sort a stream's ids by."""
    return tuple(map(int, entry_id.split(b"-")))
