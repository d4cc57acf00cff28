"""Memory that processes share by reading and writing one file, best on a tmpfs such as /dev/shm.

A plain file is used instead of ``multiprocessing.shared_memory``, whose resource tracker unlinks a segment when any of
its users ends. Here a file lives until another takes its place, whoever dies.

The file is never mapped: a process that looks into a mapping whose file somebody has truncated dies of SIGBUS, whatever
it checked before. A read of such a file is short, and an error.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

_CRC = struct.Struct("<I")


class SharedMemoryError(Exception):
    """A shared file is absent, damaged, of another layout, or in use; the message says which."""


class SharedFile:
    """A file of fixed size. Use ``create`` or ``open``. What cannot be done raises ``SharedMemoryError``."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, path: Path, size: int) -> SharedFile:
        """A file of ``size`` zero bytes that only this user may open; others find it after ``install``."""
        new = _unfinished(path)
        try:
            new.unlink(missing_ok=True)  # of a creator that was killed
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)  # a full tmpfs says so here, not at some later write
            except OSError:
                os.close(descriptor)
                new.unlink()
                raise
        except OSError as error:
            raise SharedMemoryError(f"cannot make {path} of {size:,} bytes: {error.strerror}") from error
        return cls(path, descriptor)

    @classmethod
    def open(cls, path: Path) -> SharedFile:
        """The file that is installed at ``path``."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryError(f"cannot open {path}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise SharedMemoryError(f"{path} is no file")
        return cls(path, descriptor)

    def install(self) -> None:
        """Put the file at its path, in place of what was there; who opened the old file keeps that."""
        try:
            os.rename(_unfinished(self.path), self.path)
        except OSError as error:
            raise SharedMemoryError(f"cannot make {self.path}: {error.strerror}") from error

    @property
    def size(self) -> int:
        """Bytes in the file now."""
        return self._try(os.fstat).st_size

    def write_header(self, header: bytes) -> None:
        """Put bytes and their CRC-32 at the start."""
        self.write(0, header + _CRC.pack(zlib.crc32(header)))

    def read_header(self, size: int) -> bytes:
        """What ``write_header`` was given, of such a size; an error if it is damaged."""
        data = self.read(0, size + _CRC.size)
        if _CRC.pack(zlib.crc32(data[:size])) != data[size:]:
            raise SharedMemoryError(f"{self.path}: the header is damaged")
        return data[:size]

    def read(self, offset: int, size: int) -> bytes:
        """Read up to 2 GB of the file; an error if they are not there."""
        data = self._try(os.pread, size, offset)
        if len(data) != size:
            raise SharedMemoryError(f"{self.path} is truncated")
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, of bytes; an error if the file does not hold as many."""
        done = 0
        while done < len(buffer):
            count = self._try(os.preadv, [buffer[done:]], offset + done)
            if count == 0:
                raise SharedMemoryError(f"{self.path} is truncated")
            done += count

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes into the file; an error if it was truncated and there is no room any more."""
        rest = memoryview(data)
        while rest:
            count = self._try(os.pwrite, rest, offset)
            offset, rest = offset + count, rest[count:]

    def is_replaced(self) -> bool:
        """Whether another file, or none, is now at its path, or it is closed."""
        try:
            there, mine = os.stat(self.path), os.fstat(self._descriptor)
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino)

    def lock(self) -> None:
        """Become the only process that may write; the kernel takes the lock back when this process ends."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SharedMemoryError(f"another process writes to {self.path}") from error

    def close(self) -> None:
        """Give back the lock; nothing can be read or written any more."""
        self._close()
        self._descriptor = -1  # the number may be another file's soon

    def _try(self, operation: Callable[..., _T], *arguments: object) -> _T:
        try:
            return operation(self._descriptor, *arguments)
        except OSError as error:
            raise SharedMemoryError(f"{self.path}: {error.strerror}") from error


def make_private_directory(directory: Path) -> None:
    """Make a directory that only this user may enter, unless it is there; raises ``SharedMemoryError``."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SharedMemoryError(f"cannot use {directory}: {error.strerror}") from error


def claim_directory(directory: Path) -> int:
    """Make this process the only engine that uses a directory: ``lock_directory``, or ``SharedMemoryError``."""
    try:
        descriptor = lock_directory(directory)
    except OSError as error:
        raise SharedMemoryError(f"cannot use {directory}: {error.strerror}") from error
    if descriptor is None:
        raise SharedMemoryError(f"another engine uses {directory}: each needs one of its own")
    return descriptor


def lock_directory(directory: Path) -> int | None:
    """Lock a directory, which is made if need be; None: another process has it locked. Raises ``OSError``.

    Returns:
        the descriptor that holds the lock, until it is closed or the process ends.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")
