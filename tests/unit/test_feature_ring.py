"""Rows through a ring that is overwritten while it is read: what counts as valid is what was written."""

from __future__ import annotations

import random
import time
from ctypes import c_int64
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.online.feature_ring import FeatureRing, FeatureRingReader
from evospec.engine.online.shared_file import SharedMemoryError
from tests.killable_processes import processes
from tests.unit.interleaving import at_line, before_each_line, count_lines

CODE = "/engine/online/"
WIDTH = 6


def block(number: int, count: int, width: int = WIDTH) -> torch.Tensor:
    """Rows [count, width] that tell which block they belong to, and which of its rows they are."""
    rows = torch.full((count, width), number % 256, dtype=torch.bfloat16)
    rows[:, 0] = torch.arange(count) % 256
    return rows


def references(slot: int, generation: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(slot, slot + count), torch.full((count,), generation)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features"


@settings(max_examples=100)
@given(capacity=st.integers(1, 12), counts=st.lists(st.integers(0, 12), max_size=25))
def test_any_row_ever_written_is_right_until_its_slot_is_used_again(capacity: int, counts: list[int]) -> None:
    with TemporaryDirectory() as directory:
        ring = FeatureRing(Path(directory) / "ring", capacity, WIDTH)
        reader = FeatureRingReader(Path(directory) / "ring")
        written: dict[tuple[int, int], torch.Tensor] = {}
        newest: dict[int, int] = {}
        for number, count in enumerate(counts):
            if count > capacity:
                with pytest.raises(ValueError, match="do not fit"):
                    ring.write(block(number, count))
                continue
            rows = block(number, count)
            slot, generation = ring.write(rows)
            for i, row in enumerate(rows):
                assert (slot + i, generation) not in written
                written[slot + i, generation] = row
                newest[slot + i] = generation
            if written:
                slots, generations = (torch.tensor(numbers) for numbers in zip(*written, strict=True))
                found, valid = reader.read(slots, generations)
                assert valid.tolist() == [newest[slot] == generation for slot, generation in written]
                assert torch.equal(found[valid], torch.stack(list(written.values()))[valid])
        of_another_ring = torch.tensor([0, -1, capacity, 2**40]), torch.zeros(4, dtype=torch.int64)
        assert not reader.read(*of_another_ring)[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_stored_in_bfloat16(path: Path, dtype: torch.dtype) -> None:
    ring = FeatureRing(path, 4, WIDTH)
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, valid = FeatureRingReader(path).read(*references(*ring.write(rows), 3))
    assert valid.all()
    assert torch.equal(found, rows.to(torch.bfloat16))


def test_reader_overtaken_at_any_line_notices(path: Path) -> None:
    ring = FeatureRing(path, 4, WIDTH)
    reader = FeatureRingReader(path)
    ring.write(block(0, 4))
    noticed = 0
    for line in range(count_lines(CODE, lambda: reader.read(*references(0, 0, 4)))):
        slot, generation = ring.write(block(line, 4))
        rows = references(slot, generation, 4)
        overtake = at_line(line, lambda: ring.write(block(200, 2)))
        found, valid = before_each_line(CODE, overtake, partial(reader.read, *rows))
        assert torch.equal(found[valid], block(line, 4)[valid])
        assert valid[2:].all()
        noticed += int((~valid).sum())
    assert noticed > 0


def test_rows_asked_for_before_they_are_written_are_right_or_invalid(path: Path) -> None:
    ring = FeatureRing(path, 4, WIDTH)
    reader = FeatureRingReader(path)
    slot, generation = ring.write(block(0, 4))
    for line in range(count_lines(CODE, lambda: reader.read(*references(0, 0, 4)))):
        write = at_line(line, partial(ring.write, block(line + 1, 4)))
        coming = references(slot, generation + line + 1, 4)
        found, valid = before_each_line(CODE, write, partial(reader.read, *coming))
        assert torch.equal(found[valid], block(line + 1, 4)[valid])


def test_writer_read_at_any_line_shows_no_torn_row(path: Path) -> None:
    ring = FeatureRing(path, 4, WIDTH)
    reader = FeatureRingReader(path)
    slot, generation = ring.write(block(1, 4))
    seen = []

    def look() -> None:
        for number in (1, 2):
            found, valid = reader.read(*references(slot, generation + number - 1, 4))
            assert torch.equal(found[valid], block(number, 4)[valid])
            seen.append((number, int(valid.sum())))

    before_each_line(CODE, look, lambda: ring.write(block(2, 4)))
    look()
    assert set(seen) == {(1, 4), (1, 0), (2, 0), (2, 4)}


def test_new_ring_invalidates_the_old_one_and_readers_follow(path: Path) -> None:
    old = FeatureRing(path, 4, WIDTH)
    reader = FeatureRingReader(path)
    lost = references(*old.write(block(1, 4)), 4)
    new = FeatureRing(path, 8, WIDTH)
    assert reader.read(*lost)[1].all()  # nobody overwrote it yet, as far as this reader knows
    kept = references(*new.write(block(2, 8)), 8)
    found, valid = reader.read(*kept)
    assert valid.all()
    assert torch.equal(found, block(2, 8))
    assert not reader.read(*lost)[1].any()


def test_a_ring_of_another_width_is_refused(path: Path) -> None:
    old = FeatureRing(path, 4, WIDTH)
    reader = FeatureRingReader(path)
    old.write(block(1, 4))
    rows = references(*FeatureRing(path, 4, 2 * WIDTH).write(block(2, 4, 2 * WIDTH)), 4)
    with pytest.raises(SharedMemoryError, match=f"rows of {2 * WIDTH} values in place of {WIDTH}"):
        reader.read(*rows)
    assert FeatureRingReader(path).read(*rows)[1].all()


@pytest.mark.parametrize("byte", [0, 8, 12, 16])
def test_damaged_or_missing_ring_is_refused(path: Path, byte: int) -> None:
    with pytest.raises(SharedMemoryError, match="No such file"):
        FeatureRingReader(path)
    FeatureRing(path, 4, WIDTH)
    image = bytearray(path.read_bytes())
    path.write_bytes(image[:-1])
    with pytest.raises(SharedMemoryError, match="no feature ring"):
        FeatureRingReader(path)
    image[byte] ^= 1
    path.write_bytes(image)
    with pytest.raises(SharedMemoryError, match="damaged"):
        FeatureRingReader(path)


BUSY_CAPACITY, BUSY_WIDTH, BUSY_BLOCK = 64, 4096, 8


def write_until_killed(path: Path, latest: c_int64) -> None:
    """Keep ``latest`` at the last block's first row, counted in rows: generation * capacity + slot."""
    torch.set_num_threads(1)
    ring = FeatureRing(path, BUSY_CAPACITY, BUSY_WIDTH)
    slot, generation = ring.write(torch.empty(0, BUSY_WIDTH))
    while True:
        start = generation * BUSY_CAPACITY + slot
        assert ring.write(block(start // BUSY_BLOCK, BUSY_BLOCK, BUSY_WIDTH)) == (slot, generation)
        latest.value = start
        slot = (slot + BUSY_BLOCK) % BUSY_CAPACITY
        generation += slot == 0


def read_until(path: Path, stop: Event, latest: c_int64, whole: c_int64, lost: c_int64) -> None:
    """Read rows from just written to just overwritten; each valid one must be whole and of its block."""
    torch.set_num_threads(1)
    reader = FeatureRingReader(path)
    chance = random.Random(0)
    while not stop.is_set():
        start = latest.value - chance.randrange(0, BUSY_CAPACITY + BUSY_BLOCK, BUSY_BLOCK)
        slots, generations = references(start % BUSY_CAPACITY, start // BUSY_CAPACITY, BUSY_BLOCK)
        found, valid = reader.read(slots, generations)
        assert torch.equal(found[valid], block(start // BUSY_BLOCK, BUSY_BLOCK, BUSY_WIDTH)[valid])
        whole.value += int(valid.sum())
        lost.value += int((~valid).sum())


def wait_until_past(counts: list[c_int64], marks: list[int]) -> None:
    """Wait until each count is over its mark; fails after a time that no machine should need."""
    limit = time.monotonic() + 120.0
    while any(count.value <= mark for count, mark in zip(counts, marks, strict=True)):
        assert time.monotonic() < limit, ([count.value for count in counts], marks)
        time.sleep(0.01)


def test_readers_of_a_busy_writer_that_is_killed_and_started_again(path: Path) -> None:
    stop = processes.Event()
    # Without locks, which a killed process would take with it.
    latest, *counts = (processes.RawValue(c_int64, 0) for _ in range(5))
    FeatureRing(path, BUSY_CAPACITY, BUSY_WIDTH)
    readers = [processes.Process(target=read_until, args=(path, stop, latest, *counts[i : i + 2])) for i in (0, 2)]
    for reader in readers:
        reader.start()
    for _ in range(5):
        latest.value = 0
        writer = processes.Process(target=write_until_killed, args=(path, latest))
        writer.start()
        wait_until_past([latest], [100 * BUSY_CAPACITY])
        writer.kill()
        writer.join()
        # Of a ring at rest some rows are whole and some overwritten, whoever had the cores before.
        wait_until_past(counts, [count.value for count in counts])
    stop.set()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
