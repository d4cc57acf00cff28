"""Checks the sha256 of a model's files while the engine serves: ``python -m evospec.engine.models.verify``. Torch-free.

Weights are read in seconds and hashed in many more, so the engine does not wait: a process of the lowest priority
hashes them beside it. When a sum is wrong it says so, sees to it that the file is fetched again at the next start, and
the engine ends with ``DAMAGED_STATUS``.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import structlog

from evospec.engine.log import configure_logging_from_environment
from evospec.engine.models.fetch import forget

log = structlog.get_logger(__name__)

DAMAGED_STATUS = 65
"""Exit status of an engine whose model's files are damaged: to start it again at once is of no use."""
_CHUNK, _STDIN = 1 << 20, 0


class FileCheck:
    """A process that hashes ``files``, whose sums are given; it ends with the process that made it."""

    def __init__(self, files: Mapping[Path, str]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if files:
            arguments = [word for path, sha256 in files.items() for word in (str(path), sha256)]
            command = [sys.executable, "-m", "evospec.engine.models.verify", *arguments]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def has_failed(self) -> bool:
        """Whether a sum was found to be wrong, which is in the log. Takes microseconds."""
        if self._process is None or self._process.poll() is None:
            return False
        status, self._process = self._process.returncode, None
        if status not in (0, DAMAGED_STATUS):
            log.warning("the model's files could not be verified", exit_status=status)
        return status == DAMAGED_STATUS


def verify(files: Mapping[Path, str]) -> bool:
    """Whether all of ``files`` have their sums; forgets those that have not."""
    are_right = True
    for path, expected in files.items():
        found = _sha256(path)
        if found != expected:
            log.critical("a file of the model is damaged", path=str(path), sha256=found, expected=expected)
            forget(path)
            are_right = False
    return are_right


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if select.select([_STDIN], [], [], 0)[0]:  # closed: the engine is gone
                sys.exit(1)
    return digest.hexdigest()


def main() -> None:
    """Hash the files that the arguments name, each followed by its sum."""
    os.nice(19)
    configure_logging_from_environment()
    words = sys.argv[1:]
    try:
        are_right = verify(dict(zip(map(Path, words[::2]), words[1::2], strict=True)))
    except OSError as error:
        log.error("a file of the model cannot be read", error=str(error))
        sys.exit(1)
    sys.exit(0 if are_right else DAMAGED_STATUS)


if __name__ == "__main__":
    main()
