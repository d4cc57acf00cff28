"""The draft's input features on their way to the worker: a ring of rows that the engine overwrites as it goes.

    0    header: magic, capacity, width, CRC-32
    64   generation of each row: int64 [capacity]; 2 * generation when it is complete, odd before
    ...  from the next page on, rows: bfloat16 [capacity, width]

Nobody waits for anybody. A row is right if its generation was the wanted one before it was copied and still is after.
That relies on stores being seen in their order, as on x86; elsewhere a torn row could pass, and harm one training
sample.
"""

from __future__ import annotations

import mmap
import struct
import time
import zlib
from pathlib import Path

import torch

from engine.ipc.shared_file import SharedFile, SharedMemoryError

_MAGIC = b"EVOSPFR1"
_HEADER = struct.Struct("<8sII")
_CRC = struct.Struct("<I")
_GENERATIONS_OFFSET = 64


class _Ring:
    """The arrays inside a ring's file."""

    def __init__(self, file: SharedFile) -> None:
        self.file = file
        header = file.memory[: _HEADER.size + _CRC.size]
        if len(header) < _HEADER.size + _CRC.size or _CRC.pack(zlib.crc32(header[: _HEADER.size])) != header[-4:]:
            raise SharedMemoryError(f"{file.path}: the header is damaged")
        magic, capacity, width = _HEADER.unpack_from(header)
        self.capacity: int = capacity
        self.width: int = width
        if magic != _MAGIC or len(file.memory) != _size(self.capacity, self.width):
            raise SharedMemoryError(f"{file.path} is no feature ring of this format")
        self.generations = torch.frombuffer(
            file.memory, dtype=torch.int64, count=self.capacity, offset=_GENERATIONS_OFFSET
        )
        self.rows = torch.frombuffer(
            file.memory,
            dtype=torch.bfloat16,
            count=self.capacity * self.width,
            offset=_rows_offset(self.capacity),
        ).view(self.capacity, self.width)


class FeatureRing:
    """The engine's end, the only writer.

    A new ring takes the place of one that an engine before left: its generations are greater than that one's, so
    references to lost rows stay invalid.

    Args:
        path: of the shared file.
        capacity: number of rows.
        width: values a row.

    Raises:
        SharedMemoryError: there is no room, or the path cannot be written.
    """

    def __init__(self, path: Path, capacity: int, width: int) -> None:
        file = SharedFile.create(path, _size(capacity, width))
        header = _HEADER.pack(_MAGIC, capacity, width)
        file.memory[: len(header) + _CRC.size] = header + _CRC.pack(zlib.crc32(header))
        self._ring = _Ring(file)
        self._ring.generations.fill_(-1)  # a generation that nobody can ask for
        self._next = 0
        # Microseconds: no ring goes round once each, so a later one starts further on.
        self._generation = time.time_ns() // 1000
        file.install()

    @property
    def capacity(self) -> int:
        return self._ring.capacity

    @torch.inference_mode()
    def write(self, rows: torch.Tensor) -> tuple[int, int]:
        """Store a block of rows, over the oldest ones.

        Args:
            rows: [n, width] with n <= capacity, of any dtype and device.

        Returns:
            slot of the first row, and the generation of all; row i is in slot + i. A block never wraps: where it
            does not fit before the end, it begins at slot 0.
        """
        if len(rows) > self.capacity:
            raise ValueError(f"{len(rows)} rows do not fit into {self.capacity}")
        if self._next + len(rows) > self.capacity:
            self._next = 0
            self._generation += 1
        slot, end = self._next, self._next + len(rows)
        self._ring.generations[slot:end] = 2 * self._generation - 1
        self._ring.rows[slot:end].copy_(rows)
        self._ring.generations[slot:end] = 2 * self._generation
        self._next = end
        return slot, self._generation

    def is_replaced(self) -> bool:
        """Whether readers cannot find it any more: its file was deleted, or another is in its place."""
        return self._ring.file.is_replaced()

    def close(self) -> None:
        """Stop writing. Readers keep what is there."""
        self._ring.file.close()


class FeatureRingReader:
    """Another process's end. Follows the engine to its next ring when it is restarted.

    Raises:
        SharedMemoryError: no ring is at ``path``, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ring = _Ring(SharedFile.open(path))
        self.num_read = 0
        """Rows asked for so far."""
        self.num_overwritten = 0
        """How many of them were overwritten, before or while they were read, or lost with their engine."""

    @property
    def width(self) -> int:
        """Values a row."""
        return self._ring.width

    def read(self, slots: torch.Tensor, generations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy rows out of the ring.

        Args:
            slots, generations: int64 [n], as ``write`` gave them.

        Returns:
            rows bfloat16 [n, width], and bool [n]: which of them are what was written. The others hold anything.

        Raises:
            SharedMemoryError: the ring was removed, or replaced by one that is damaged.
        """
        rows, valid = self._copy(slots, generations)
        if not valid.all() and self._ring.file.is_replaced():
            self._ring = _Ring(SharedFile.open(self._path))
            rows, valid = self._copy(slots, generations)
        self.num_read += len(slots)
        self.num_overwritten += int((~valid).sum())
        return rows, valid

    def _copy(self, slots: torch.Tensor, generations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = slots.clamp(0, self._ring.capacity - 1)  # a reference may be to another ring
        before = self._ring.generations[known]
        rows = self._ring.rows[known]
        after = self._ring.generations[known]
        return rows, (known == slots) & (before == 2 * generations) & (after == 2 * generations)


def _rows_offset(capacity: int) -> int:
    end = _GENERATIONS_OFFSET + 8 * capacity
    return -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def _size(capacity: int, width: int) -> int:
    return _rows_offset(capacity) + 2 * capacity * width
