"""Directories of one ``evospec serve``: for sockets, and shared memory, that nobody else can reach."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structlog

from evospec.server.settings import ConfigurationError

log = structlog.get_logger(__name__)

_PREFIX = "evospec-"
_LOCK = "instance.lock"


@contextlib.contextmanager
def instance_directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory that only this user can enter, in ``parent``: ``$XDG_RUNTIME_DIR``, or the temporary directory.

    It is removed at the end. A process that is killed leaves its own; the next one to start removes that.
    """
    if parent is None:
        given = os.environ.get("XDG_RUNTIME_DIR")
        parent = Path(given if given and os.access(given, os.W_OK) else tempfile.gettempdir())
    _remove_abandoned(parent)
    try:
        directory = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)
    except OSError as error:
        raise ConfigurationError(f"no directory can be made in {parent}: {error.strerror}") from error
    with directory as name, _locked(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a file in ``directory`` that the kernel takes back when this process ends, however it does."""
    unfinished = directory / f"{_LOCK}.new"
    with unfinished.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unfinished.rename(directory / _LOCK)  # nobody ever finds it unlocked while this process lives
        yield


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's directories in ``parent`` whose process is gone."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        directory = lock.parent
        try:
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
        except (BlockingIOError, FileNotFoundError):
            continue  # its process lives, or another that starts removes it
        except OSError as error:
            log.warning("cannot remove what an instance left", directory=str(directory), error=str(error))
        else:
            log.info("removed what a killed instance left", directory=str(directory))
