"""Device memory that another process maps: its CUDA IPC handle goes over a Unix socket.

Not run on a GPU yet.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
import torch

from evospec.engine.online.shared_file import SharedMemoryError

log = structlog.get_logger(__name__)

_TIMEOUT = 5.0
_MAX_MESSAGE = 4096

# What `UntypedStorage._share_cuda_` returns and `_new_shared_cuda` takes: device, handle, bytes, offset in bytes,
# handle and offset of the reference counter, handle of the event, whether to wait for it.
_Handle = tuple[int, bytes, int, int, bytes, int, bytes, bool]


class HandleServer:
    """Gives the handle of ``memory`` to whoever of this user connects to ``path``.

    ``memory`` must stay allocated as long as others use it: the process that can least do without it should own it.

    Raises:
        SharedMemoryError: no socket can be made at ``path`` (Unix allows about 100 characters).
    """

    def __init__(self, memory: torch.Tensor, path: Path) -> None:
        self._memory = memory
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
            path.chmod(0o600)
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise SharedMemoryError(f"cannot listen on {path}: {error}") from error
        threading.Thread(target=self._serve, name="cuda-handles", daemon=True).start()

    def close(self) -> None:
        """Give the handle to nobody else."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which closing alone does not
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    connection.settimeout(_TIMEOUT)
                    # Made anew for each receiver, since each counts as one user of the storage.
                    handle = self._memory.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
                    connection.sendall(msgspec.msgpack.encode(handle))
                except (OSError, RuntimeError) as error:
                    log.warning("device memory could not be shared", error=str(error))


def receive_memory(path: Path) -> torch.Tensor:
    """The memory of the ``HandleServer`` at ``path``, as uint8 [bytes] on this process's device of the same index.

    Raises:
        SharedMemoryError: nobody answers there, or the answer is no handle.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT)
            connection.connect(str(path))
            with connection.makefile("rb") as stream:
                handle = msgspec.msgpack.decode(stream.read(_MAX_MESSAGE), type=_Handle)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        storage = torch.UntypedStorage._new_shared_cuda(*handle)
    except (OSError, msgspec.MsgspecError, RuntimeError, AssertionError) as error:  # the last: torch is built for CPUs
        raise SharedMemoryError(f"no device memory from {path}: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
