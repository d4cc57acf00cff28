"""Draft weights that a worker publishes and the engine takes over between two steps.

The engine makes the channel and reads it; the worker attaches to it and writes (``WeightWriter``). The memory is the
engine's, so nothing that becomes of the worker can take it away:

    channel = WeightChannel.create(path, WeightLayout.of(tensors), num_slots=8)
    ...
    if channel.poll() != seen:                      # every step
        slots = channel.slots()
        channel.read_into(0, tensors)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from engine.ipc.cuda_memory import HandleServer, receive_memory
from engine.ipc.shared_file import SharedMemoryError
from engine.ipc.weight_directory import Slot, WeightDirectory
from engine.ipc.weight_layout import WeightBuffers, WeightLayout

_ATTEMPTS = 4


class WeightChannel:
    """Slots of equal layout, each with a key and a version, each doubly buffered.

    What a reader gets is a whole published version or an exception: each copy is checked against the checksum it was
    published with, and against the slot having changed meanwhile. Use ``create`` or ``attach``.
    """

    def __init__(
        self,
        directory: WeightDirectory,
        layout: WeightLayout,
        memory: torch.Tensor,
        handles: HandleServer | None = None,
    ) -> None:
        self.layout = layout
        self.num_slots = directory.num_slots
        self.directory = directory
        self.buffers = WeightBuffers(layout, memory)
        self._handles = handles

    @classmethod
    def create(
        cls, path: Path, layout: WeightLayout, num_slots: int, device: torch.device | None = None
    ) -> WeightChannel:
        """The engine's end.

        On the CPU a channel that an engine before left at ``path`` is taken over with all it holds, if it fits.
        Otherwise a new one takes its place (versions go on from the old one's where that can be read), and the worker
        finds out at its next publication.

        Args:
            path: of the shared file; for a CUDA device there is a Unix socket beside it.
            device: where the buffers are (None: CPU).

        Raises:
            SharedMemoryError: there is no room, or the path cannot be written.
        """
        device = device or torch.device("cpu")
        old = _open_if_sound(path)
        wanted = ("host", layout.fingerprint, num_slots)
        if device.type == "cpu" and old is not None and (old.kind, old.fingerprint, old.num_slots) == wanted:
            return cls(old, layout, _host_memory(old))
        return cls._make(path, layout, num_slots, device, old.version if old is not None else 0)

    @classmethod
    def _make(
        cls, path: Path, layout: WeightLayout, num_slots: int, device: torch.device, version: int
    ) -> WeightChannel:
        if device.type == "cpu":
            directory = WeightDirectory.create(path, layout, num_slots, "host", version)
            return cls(directory, layout, _host_memory(directory))
        memory = torch.zeros(2 * num_slots, layout.nbytes, dtype=torch.uint8, device=device)
        handles = HandleServer(memory, _socket_path(path))
        return cls(WeightDirectory.create(path, layout, num_slots, "cuda", version), layout, memory, handles)

    @classmethod
    def attach(cls, path: Path, layout: WeightLayout) -> WeightChannel:
        """Another process's end.

        Raises:
            SharedMemoryError: no channel is there, it is damaged, or of another layout.
        """
        directory = WeightDirectory.open(path)
        if directory.fingerprint != layout.fingerprint:
            raise SharedMemoryError(
                f"{path} is for other weights: layout {directory.fingerprint.hex()[:16]}, "
                f"not {layout.fingerprint.hex()[:16]}"
            )
        if directory.kind == "host":
            return cls(directory, layout, _host_memory(directory))
        memory = receive_memory(_socket_path(path))
        if len(memory) != 2 * directory.num_slots * layout.nbytes:
            raise SharedMemoryError(f"{path}: the device memory is another channel's")
        return cls(directory, layout, memory.view(2 * directory.num_slots, layout.nbytes))

    def replace(self, version: int) -> WeightChannel:
        """A channel of empty slots in place of this one, which is damaged; for the engine alone.

        The worker finds out as it does with a new engine's, and publishes again. ``version``: the new one's at first.

        Raises:
            SharedMemoryError: it cannot be made; this one stays.
        """
        path, device = self.directory.file.path, self.buffers.device
        channel = self._make(path, self.layout, self.num_slots, device, version)
        self.close()
        return channel

    def is_replaced(self) -> bool:
        """Whether nobody can find it any more: its file was deleted, or another is in its place."""
        return self.directory.file.is_replaced()

    def poll(self) -> int:
        """The channel's version; another than last time means that some slot changed. Tens of nanoseconds."""
        return self.directory.version

    def slots(self) -> tuple[Slot, ...]:
        """Key and version of every slot; raises ``SharedMemoryError`` if the channel is damaged."""
        return self.directory.slots()

    @torch.inference_mode()
    def read_into(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> Slot:
        """Copy what a slot holds into ``tensors``, in place; an empty slot leaves them as they are.

        Returns:
            the key and version that were read.

        Raises:
            SharedMemoryError: the channel or these weights are damaged, or changed faster than they could be read.
                ``tensors`` are as they were; what is published next can be read again.
            ValueError: ``tensors`` are of another layout.
        """
        self.layout.check(tensors)
        for _ in range(_ATTEMPTS):
            state = self.slots()[slot]
            if state.key is None:
                return state
            checksum = self.buffers.stage(2 * slot + state.buffer)
            if self.slots()[slot] != state:
                continue
            if checksum != state.checksum:
                raise SharedMemoryError(f"{self.directory.file.path}: slot {slot}: wrong checksum")
            self.buffers.unstage(tensors)
            return state
        raise SharedMemoryError(f"{self.directory.file.path}: slot {slot} changes faster than it can be read")

    def close(self) -> None:
        """Stop giving the memory to others. It stays in place for a successor."""
        if self._handles is not None:
            self._handles.close()
        self.directory.file.close()


def _open_if_sound(path: Path) -> WeightDirectory | None:
    try:
        return WeightDirectory.open(path)
    except SharedMemoryError:
        return None


def _host_memory(directory: WeightDirectory) -> torch.Tensor:
    return torch.frombuffer(directory.buffers, dtype=torch.uint8).view(2 * directory.num_slots, directory.stride)


def _socket_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sock")
