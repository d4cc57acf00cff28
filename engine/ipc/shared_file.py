"""Memory that processes share by mapping one file, best on a tmpfs such as /dev/shm.

A plain file is used instead of ``multiprocessing.shared_memory``, whose resource tracker unlinks a segment when any of
its users ends. Here a file lives until another takes its place, whoever dies.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from pathlib import Path


class SharedMemoryError(Exception):
    """A shared file is absent, damaged, of another layout, or in use; the message says which."""


class SharedFile:
    """A file of fixed size, mapped whole. Use ``create`` or ``open``."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, _release, descriptor)
        self.memory = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, path: Path, size: int) -> SharedFile:
        """A file of ``size`` zero bytes that only this user may open; others find it after ``install``.

        Raises:
            SharedMemoryError: there is no room for it, or ``path`` cannot be written.
        """
        new = _unfinished(path)
        try:
            new.unlink(missing_ok=True)  # of a creator that was killed
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                # Pages that a full tmpfs cannot give later would kill the process that touches them.
                os.posix_fallocate(descriptor, 0, size)
            except OSError:
                os.close(descriptor)
                new.unlink()
                raise
        except OSError as error:
            raise SharedMemoryError(f"cannot make {path} of {size:,} bytes: {error.strerror}") from error
        return cls(path, descriptor)

    @classmethod
    def open(cls, path: Path) -> SharedFile:
        """The file that is installed at ``path``; raises ``SharedMemoryError``."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryError(f"cannot open {path}: {error.strerror}") from error
        try:
            return cls(path, descriptor)
        except (OSError, ValueError) as error:
            raise SharedMemoryError(f"cannot map {path}: {error}") from error

    def install(self) -> None:
        """Put it at its path, in place of what was there; who mapped the old file keeps that."""
        os.rename(_unfinished(self.path), self.path)

    def is_replaced(self) -> bool:
        """Whether another file, or none, is now at its path."""
        try:
            there = os.stat(self.path)
        except OSError:
            return True
        mine = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino)

    def lock(self) -> None:
        """Become the only process that may write; the kernel takes the lock back when this process ends.

        Raises:
            SharedMemoryError: another has it.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SharedMemoryError(f"another process writes to {self.path}") from error

    def close(self) -> None:
        """Give back the lock. The memory goes with the last object that looks into it."""
        self._close()


def make_private_directory(directory: Path) -> None:
    """One that only this user may enter, unless it is there; raises ``SharedMemoryError``."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SharedMemoryError(f"cannot use {directory}: {error.strerror}") from error


def claim_directory(directory: Path) -> int:
    """Make this process the only engine that uses a directory, which is made if need be.

    Returns:
        the descriptor that holds the claim, until it is closed or the process ends.

    Raises:
        SharedMemoryError: another process has it, or it cannot be made.
    """
    make_private_directory(directory)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SharedMemoryError(f"cannot use {directory}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise SharedMemoryError(f"another engine uses {directory}: each needs one of its own") from error
    return descriptor


def _release(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: the mapping has a duplicate
    os.close(descriptor)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")
