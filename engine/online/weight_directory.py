"""Which version of which key is in which buffer: the part of a weight channel that is always in host memory.

    0    header: magic, kind of memory, number of slots, bytes a buffer, layout fingerprint, CRC-32
    64   the word: version * 2 + index of the directory in force
    128  directory 0: CRC-32, length, MessagePack; then directory 1
    ...  (host memory only) from the next page on, two buffers a slot

A publication fills a buffer and the directory that are not in force and then writes the word. That is one write of 8
aligned bytes, so every other moment of a writer's death leaves what was in force as it was.

Whoever may write the file may write anything: a reader takes nothing for granted that it has not checked.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from pathlib import Path
from typing import Literal

import msgspec

from evospec.engine.online.adapter_control import MAX_KEY_BYTES
from evospec.engine.online.shared_file import SharedFile, SharedMemoryError
from evospec.engine.online.weight_layout import WeightLayout

MAX_VERSION = 2**62
"""No version is greater; a channel that says so is damaged."""

MemoryKind = Literal["host", "cuda"]

_MAGIC = b"EVOSPCW1"
_KINDS: tuple[MemoryKind, ...] = ("host", "cuda")
_HEADER = struct.Struct("<8sIIQ32s")
_PREFIX = struct.Struct("<II")
_WORD = struct.Struct("<Q")
_WORD_OFFSET = 64
_DIRECTORY_OFFSET = 128
_BYTES_PER_SLOT = MAX_KEY_BYTES + 32  # key with its prefix, two 64-bit numbers, a bool, an array's prefix
_DIRECTORY_MARGIN = 64
_MAX_SLOTS = 4096
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

    def is_sound(self) -> bool:
        """Whether every field can be right."""
        if self.key is not None and not (0 < len(self.key.encode()) <= MAX_KEY_BYTES and self.version > 0):
            return False
        return 0 <= self.version <= MAX_VERSION and self.buffer in (0, 1)


class _Directory(msgspec.Struct, frozen=True, array_like=True):
    version: int
    slots: tuple[Slot, ...]

    def is_sound(self) -> bool:
        """Whether every field can be right, and the slots go together."""
        keys = [slot.key for slot in self.slots if slot.key is not None]
        return (
            len(set(keys)) == len(keys)
            and all(slot.is_sound() and slot.version <= self.version for slot in self.slots)
            and 0 <= self.version <= MAX_VERSION
        )

    def follows(self, earlier: _Directory) -> bool:
        """Whether no version has gone back, and what has changed has a greater one."""
        slots = zip(self.slots, earlier.slots, strict=True)
        are_later = all(slot == before or slot.version > before.version for slot, before in slots)
        return are_later and (self == earlier or self.version > earlier.version)


class WeightDirectory:
    """The header, the word and both directories of an open channel.

    ``SharedMemoryError``: they are damaged, not there, or cannot be written.
    """

    def __init__(self, file: SharedFile) -> None:
        self.file = file
        self._header = file.read_header(_HEADER.size)
        magic, kind, num_slots, stride, fingerprint = _HEADER.unpack(self._header)
        self.num_slots: int = num_slots
        self.stride: int = stride
        """Bytes a buffer."""
        self.fingerprint: bytes = fingerprint
        if magic != _MAGIC or kind >= len(_KINDS) or not 0 < num_slots <= _MAX_SLOTS:
            raise SharedMemoryError(f"{file.path} is no weight channel of this format")
        self.kind = _KINDS[kind]
        self._check()
        self._last = _Directory(-1, (Slot(),) * self.num_slots)
        """The directory that was read last."""

    @classmethod
    def open(cls, path: Path) -> WeightDirectory:
        directory = cls(SharedFile.open(path))
        directory.slots()
        return directory

    @classmethod
    def create(
        cls, path: Path, layout: WeightLayout, num_slots: int, kind: MemoryKind, version: int
    ) -> WeightDirectory:
        """A channel of empty slots, at ``version``, in place of what is at ``path``."""
        file = SharedFile.create(path, _file_size(kind, num_slots, layout.nbytes))
        header = _HEADER.pack(_MAGIC, _KINDS.index(kind), num_slots, layout.nbytes, layout.fingerprint)
        file.write_header(header)
        directory = cls(file)
        directory.commit(version, (Slot(),) * num_slots)
        file.install()
        return directory

    @property
    def version(self) -> int:
        """Version in force, by one read of 8 bytes."""
        return self._read_word() >> 1

    @property
    def sound_version(self) -> int:
        """Version of the directory that ``slots`` returned last."""
        return self._last.version

    @property
    def data_offset(self) -> int:
        """Offset of the first buffer, where these are in host memory."""
        return _data_offset(self.num_slots)

    def slots(self) -> tuple[Slot, ...]:
        """All slots as of one version, which is not older than one that was read before."""
        self._check()
        for _ in range(_ATTEMPTS):
            word = self._read_word()
            directory = self._decode(word & 1)
            if directory is not None and directory.version == word >> 1 and directory.follows(self._last):
                self._last = directory
                return directory.slots
            if self._read_word() == word:
                raise SharedMemoryError(f"{self.file.path}: the directory is damaged")
            # Two publications came while it was read.
        raise SharedMemoryError(f"{self.file.path}: the directory changes faster than it can be read")

    def commit(self, version: int, slots: tuple[Slot, ...]) -> None:
        """Put ``slots`` in force as ``version``."""
        if version > MAX_VERSION:
            raise SharedMemoryError(f"{self.file.path}: there is no version after {MAX_VERSION}")
        index = 1 - (self._read_word() & 1)
        payload = msgspec.msgpack.encode(_Directory(version, slots))
        self.file.write(self._directory_start(index), _PREFIX.pack(zlib.crc32(payload), len(payload)) + payload)
        self.file.write(_WORD_OFFSET, _WORD.pack(version << 1 | index))

    def _read_word(self) -> int:
        word: int = _WORD.unpack(self.file.read(_WORD_OFFSET, _WORD.size))[0]
        return word

    def _decode(self, index: int) -> _Directory | None:
        """A directory that is whole and sound, or None."""
        area = self.file.read(self._directory_start(index), _directory_size(self.num_slots))
        checksum, length = _PREFIX.unpack_from(area)
        payload = area[_PREFIX.size : _PREFIX.size + length]
        if len(payload) != length or zlib.crc32(payload) != checksum:
            return None
        try:
            directory = msgspec.msgpack.decode(payload, type=_Directory)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return directory if len(directory.slots) == self.num_slots and directory.is_sound() else None

    def _check(self) -> None:
        """Raise ``SharedMemoryError`` unless the header is what it was at first, and the file as large as it tells."""
        if self.file.read_header(_HEADER.size) != self._header:
            raise SharedMemoryError(f"{self.file.path}: the header is damaged")
        if self.file.size != _file_size(self.kind, self.num_slots, self.stride):
            raise SharedMemoryError(f"{self.file.path}: the header tells of another size")

    def _directory_start(self, index: int) -> int:
        return _DIRECTORY_OFFSET + index * _directory_size(self.num_slots)


def _directory_size(num_slots: int) -> int:
    return _DIRECTORY_MARGIN + num_slots * _BYTES_PER_SLOT


def _file_size(kind: MemoryKind, num_slots: int, stride: int) -> int:
    return _data_offset(num_slots) + (2 * num_slots * stride if kind == "host" else 0)


def _data_offset(num_slots: int) -> int:
    end = _DIRECTORY_OFFSET + 2 * _directory_size(num_slots)
    return -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
