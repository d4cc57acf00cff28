"""The draft's input features on their way to the worker: a ring of rows that the engine overwrites as it goes.

    0    header: magic, capacity, width, CRC-32
    64   generation of each row: int64 [capacity]; 2 * generation when it is complete, odd before
    ...  from the next page on, rows: bfloat16 [capacity, width]

Nobody waits for anybody. A row is right if its generation was the wanted one before it was copied and still is after.
That relies on writes being seen in their order, as on x86; elsewhere a torn row could pass, and harm one training
sample.

Whoever may write the file may write anything: a reader takes nothing for granted that it has not checked.
"""

from __future__ import annotations

import mmap
import struct
import time
from itertools import pairwise
from pathlib import Path

import torch

from evospec.engine.online.shared_file import SharedFile, SharedMemoryError

_MAGIC = b"EVOSPFR1"
_HEADER = struct.Struct("<8sII")
_GENERATIONS_OFFSET = 64
_ROWS_DTYPE = torch.bfloat16


class _Ring:
    """The header of a ring's file, and where its arrays are; each method raises ``SharedMemoryError``."""

    def __init__(self, file: SharedFile) -> None:
        self.file = file
        self._header = file.read_header(_HEADER.size)
        magic, capacity, width = _HEADER.unpack(self._header)
        self.capacity: int = capacity
        self.width: int = width
        if magic != _MAGIC or not capacity or not width or file.size != _size(capacity, width):
            raise SharedMemoryError(f"{file.path} is no feature ring of this format")

    def is_sound(self) -> bool:
        """Whether header and size are what they were at first."""
        try:
            is_same = self.file.read_header(_HEADER.size) == self._header
            return is_same and self.file.size == _size(self.capacity, self.width)
        except SharedMemoryError:
            return False

    def generations(self, slot: int, count: int) -> torch.Tensor:
        """The generations int64 [count] of the rows from ``slot`` on."""
        generations = torch.empty(count, dtype=torch.int64)
        self.file.read_into(_GENERATIONS_OFFSET + 8 * slot, _bytes(generations))
        return generations

    def set_generations(self, slot: int, count: int, value: int) -> None:
        """Give ``count`` rows from ``slot`` on the same generation."""
        self.file.write(_GENERATIONS_OFFSET + 8 * slot, struct.pack("<q", value) * count)

    def read_rows(self, slot: int, rows: torch.Tensor) -> None:
        """Fill ``rows``, bfloat16 [n, width], from ``slot`` on."""
        self.file.read_into(_rows_offset(self.capacity) + 2 * slot * self.width, _bytes(rows))

    def write_rows(self, slot: int, rows: torch.Tensor) -> None:
        """Copy ``rows``, bfloat16 [n, width], to the places from ``slot`` on."""
        self.file.write(_rows_offset(self.capacity) + 2 * slot * self.width, _bytes(rows))


class FeatureRing:
    """The engine's end of a ring of ``capacity`` rows, the only one that writes.

    A new ring takes the place of one that an engine before left: its generations are greater than that one's, so
    references to lost rows stay invalid.

    Raises:
        SharedMemoryError: there is no room, or the path cannot be written.
    """

    def __init__(self, path: Path, capacity: int, width: int) -> None:
        file = SharedFile.create(path, _size(capacity, width))
        file.write_header(_HEADER.pack(_MAGIC, capacity, width))
        self._ring = _Ring(file)
        self._ring.set_generations(0, capacity, -1)  # a generation that nobody can ask for
        self._next = 0
        # Microseconds: no ring goes round once each, so a later one starts further on.
        self._generation = time.time_ns() // 1000
        file.install()

    @torch.inference_mode()
    def write(self, rows: torch.Tensor) -> tuple[int, int]:
        """Store a block of rows [n, width], n <= capacity, of any dtype and device, over the oldest ones.

        Returns:
            slot of the first row, and the generation of all; row i is in slot + i. A block never wraps: where it
            does not fit before the end, it begins at slot 0.

        Raises:
            SharedMemoryError: somebody truncated the file, and there is no room to write it again.
        """
        capacity = self._ring.capacity
        if len(rows) > capacity:
            raise ValueError(f"{len(rows)} rows do not fit into {capacity}")
        if self._next + len(rows) > capacity:
            self._next = 0
            self._generation += 1
        slot = self._next
        self._ring.set_generations(slot, len(rows), 2 * self._generation - 1)
        self._ring.write_rows(slot, rows.to("cpu", _ROWS_DTYPE).contiguous())
        self._ring.set_generations(slot, len(rows), 2 * self._generation)
        self._next += len(rows)
        return slot, self._generation

    def is_lost(self) -> bool:
        """Whether readers cannot use it any more: its file was deleted, replaced or damaged."""
        return self._ring.file.is_replaced() or not self._ring.is_sound()

    def close(self) -> None:
        """Stop writing. Readers keep what is there."""
        self._ring.file.close()


class FeatureRingReader:
    """Another process's end of the ring. It follows the engine to its next ring when that is restarted.

    Raises:
        SharedMemoryError: no ring is at ``path``, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ring = _Ring(SharedFile.open(path))

    @property
    def width(self) -> int:
        """Number of values in a row."""
        return self._ring.width

    def read(self, slots: torch.Tensor, generations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy rows out of the ring, given their slots and generations, int64 [n], as ``write`` gave them.

        Returns:
            rows bfloat16 [n, width], and bool [n]: which of them are what was written. The others hold anything.

        Raises:
            SharedMemoryError: the ring was removed or truncated, or replaced by one that is damaged or of another
                width.
        """
        rows, valid = self._copy(slots, generations)
        if not valid.all() and self._ring.file.is_replaced():
            ring = _Ring(SharedFile.open(self._path))
            if ring.width != self.width:
                raise SharedMemoryError(f"{self._path}: rows of {ring.width} values in place of {self.width}")
            self._ring = ring
            return self._copy(slots, generations)
        return rows, valid

    def _copy(self, slots: torch.Tensor, generations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.zeros(len(slots), self.width, dtype=_ROWS_DTYPE)
        valid = torch.zeros(len(slots), dtype=torch.bool)
        known = torch.nonzero((slots >= 0) & (slots < self._ring.capacity)).view(-1)  # others are of another ring
        for run in _runs(slots[known]):
            places = known[run]
            first, count = int(slots[places[0]]), len(places)
            found = torch.empty(count, self.width, dtype=_ROWS_DTYPE)
            before = self._ring.generations(first, count)
            self._ring.read_rows(first, found)
            after = self._ring.generations(first, count)
            wanted = 2 * generations[places]
            rows[places], valid[places] = found, (before == wanted) & (after == wanted)
        return rows, valid


def _runs(numbers: torch.Tensor) -> list[slice]:
    """The places of each run of consecutive numbers."""
    breaks = (torch.nonzero(numbers.diff() != 1).view(-1) + 1).tolist()
    bounds = [0, *breaks, len(numbers)] if len(numbers) else []
    return [slice(start, end) for start, end in pairwise(bounds)]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.view(torch.uint8).numpy().reshape(-1).data


def _rows_offset(capacity: int) -> int:
    end = _GENERATIONS_OFFSET + 8 * capacity
    return -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def _size(capacity: int, width: int) -> int:
    return _rows_offset(capacity) + 2 * capacity * width
