"""Which version of which key is in which buffer: the part of a weight channel that is always in host memory.

    0    header: magic, kind of memory, number of slots, bytes a buffer, layout fingerprint, CRC-32
    64   the word: version * 2 + index of the directory in force
    128  directory 0: CRC-32, length, MessagePack; then directory 1
    ...  (host memory only) from the next page on, two buffers a slot

A publication fills a buffer and the directory that are not in force and then stores the word. That is one aligned
64-bit store, so every other moment of a writer's death leaves what was in force as it was.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from pathlib import Path
from typing import Literal

import msgspec

from engine.ipc.shared_file import SharedFile, SharedMemoryError
from engine.ipc.weight_layout import WeightLayout

MAX_KEY_BYTES = 128
"""Longest key of a slot, in UTF-8."""

MemoryKind = Literal["host", "cuda"]

_MAGIC = b"EVOSPCW1"
_KINDS: tuple[MemoryKind, ...] = ("host", "cuda")
_HEADER = struct.Struct("<8sIIQ32s")
_CRC = struct.Struct("<I")
_PREFIX = struct.Struct("<II")
_WORD_OFFSET = 64
_DIRECTORY_OFFSET = 128
_BYTES_PER_SLOT = MAX_KEY_BYTES + 32  # key with its prefix, two 64-bit numbers, a bool, an array's prefix
_DIRECTORY_MARGIN = 64
_ATTEMPTS = 16


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """What a slot holds.

    ``key`` is None while it is empty; ``version`` is that of the channel when the slot last changed (0: never).
    ``buffer`` (0 or 1) and ``checksum`` are the channel's own affair.
    """

    key: str | None = None
    version: int = 0
    buffer: int = 0
    checksum: int = 0


class _Directory(msgspec.Struct, frozen=True, array_like=True):
    version: int
    slots: tuple[Slot, ...]


class WeightDirectory:
    """The header, the word and both directories of an open channel."""

    def __init__(self, file: SharedFile) -> None:
        self.file = file
        self._bytes = memoryview(file.memory)
        if len(self._bytes) < _DIRECTORY_OFFSET:
            raise SharedMemoryError(f"{file.path} is no weight channel: {len(self._bytes)} bytes")
        # Native 64-bit items of an aligned view: read and stored by one instruction each.
        self._word = self._bytes[_WORD_OFFSET : _WORD_OFFSET + 8].cast("Q")
        self._header = bytes(self._bytes[: _HEADER.size + _CRC.size])
        self._check_header()
        magic, kind, self.num_slots, self.stride, self.fingerprint = _HEADER.unpack_from(self._header)
        if magic != _MAGIC or len(self._bytes) < _data_offset(self.num_slots) + _data_size(
            kind, self.num_slots, self.stride
        ):
            raise SharedMemoryError(f"{file.path} is no weight channel of this format")
        self.kind = _KINDS[kind]

    @classmethod
    def open(cls, path: Path) -> WeightDirectory:
        """The channel at ``path``.

        Raises:
            SharedMemoryError: there is none, or it is damaged.
        """
        directory = cls(SharedFile.open(path))
        directory.slots()
        return directory

    @classmethod
    def create(
        cls, path: Path, layout: WeightLayout, num_slots: int, kind: MemoryKind, version: int
    ) -> WeightDirectory:
        """A channel of empty slots, at ``version``, in place of what is at ``path``; raises ``SharedMemoryError``."""
        number = _KINDS.index(kind)
        file = SharedFile.create(path, _data_offset(num_slots) + _data_size(number, num_slots, layout.nbytes))
        header = _HEADER.pack(_MAGIC, number, num_slots, layout.nbytes, layout.fingerprint)
        file.memory[: len(header) + _CRC.size] = header + _CRC.pack(zlib.crc32(header))
        directory = cls(file)
        directory.commit(version, (Slot(),) * num_slots)
        file.install()
        return directory

    @property
    def version(self) -> int:
        """Version in force: one load of 8 bytes."""
        return self._word[0] >> 1

    @property
    def buffers(self) -> memoryview:
        """The bytes behind the directories, where host memory has its buffers."""
        return self._bytes[_data_offset(self.num_slots) :]

    def slots(self) -> tuple[Slot, ...]:
        """All slots as of one version.

        Raises:
            SharedMemoryError: the header or the directory is damaged.
        """
        self._check_header()
        for _ in range(_ATTEMPTS):
            word = self._word[0]
            directory = self._decode(word & 1)
            if directory is not None and directory.version == word >> 1 and len(directory.slots) == self.num_slots:
                return directory.slots
            if self._word[0] == word:
                raise SharedMemoryError(f"{self.file.path}: the directory is damaged")
            # Two publications came while it was read.
        raise SharedMemoryError(f"{self.file.path}: the directory changes faster than it can be read")

    def commit(self, version: int, slots: tuple[Slot, ...]) -> None:
        """Put ``slots`` in force as ``version``."""
        index = 1 - (self._word[0] & 1)
        payload = msgspec.msgpack.encode(_Directory(version, slots))
        start = self._directory_start(index)
        end = start + _PREFIX.size + len(payload)
        self._bytes[start:end] = _PREFIX.pack(zlib.crc32(payload), len(payload)) + payload
        self._word[0] = version << 1 | index

    def _decode(self, index: int) -> _Directory | None:
        start = self._directory_start(index)
        area = bytes(self._bytes[start : start + _directory_size(self.num_slots)])
        checksum, length = _PREFIX.unpack_from(area)
        payload = area[_PREFIX.size : _PREFIX.size + length]
        if len(payload) != length or zlib.crc32(payload) != checksum:
            return None
        try:
            return msgspec.msgpack.decode(payload, type=_Directory)
        except msgspec.MsgspecError:
            return None

    def _check_header(self) -> None:
        header = bytes(self._bytes[: len(self._header)])
        checksum = _CRC.pack(zlib.crc32(header[: _HEADER.size]))
        if header != self._header or header[_HEADER.size :] != checksum:
            raise SharedMemoryError(f"{self.file.path}: the header is damaged")

    def _directory_start(self, index: int) -> int:
        return _DIRECTORY_OFFSET + index * _directory_size(self.num_slots)


def _directory_size(num_slots: int) -> int:
    return _DIRECTORY_MARGIN + num_slots * _BYTES_PER_SLOT


def _data_size(kind: int, num_slots: int, stride: int) -> int:
    return 2 * num_slots * stride if _KINDS[kind] == "host" else 0


def _data_offset(num_slots: int) -> int:
    end = _DIRECTORY_OFFSET + 2 * _directory_size(num_slots)
    return -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
