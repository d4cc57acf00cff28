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

from engine.online.cuda_memory import HandleServer, receive_memory
from engine.online.shared_file import SharedMemoryError
from engine.online.weight_directory import Slot, WeightDirectory
from engine.online.weight_layout import BufferMemory, DeviceMemory, FileMemory, WeightBuffers, WeightLayout

_ATTEMPTS = 4


class NonFiniteWeights(SharedMemoryError):
    """What was published arrived whole and has numbers that are infinite or none. The channel itself is sound."""


class WeightChannel:
    """Slots of equal layout, each with a key and a version, each doubly buffered.

    What a reader gets is a whole published version or an exception: each copy is checked against the checksum it was
    published with, against the slot having changed meanwhile, and for numbers that are not finite. Use ``create`` or
    ``attach``.
    """

    def __init__(
        self,
        directory: WeightDirectory,
        layout: WeightLayout,
        memory: BufferMemory,
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
        """The engine's end of a channel.

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
        if old is None:
            return cls._make(path, layout, num_slots, device, 0)
        if (device.type, old.kind, old.num_slots) == ("cpu", "host", num_slots) and _is_of(old, layout):
            return cls(old, layout, _file_memory(old))
        return cls._make(path, layout, num_slots, device, old.sound_version)

    @classmethod
    def _make(
        cls, path: Path, layout: WeightLayout, num_slots: int, device: torch.device, version: int
    ) -> WeightChannel:
        if device.type == "cpu":
            directory = WeightDirectory.create(path, layout, num_slots, "host", version)
            return cls(directory, layout, _file_memory(directory))
        memory = torch.zeros(2 * num_slots, layout.nbytes, dtype=torch.uint8, device=device)
        handles = HandleServer(memory, _socket_path(path))
        directory = WeightDirectory.create(path, layout, num_slots, "cuda", version)
        return cls(directory, layout, DeviceMemory(memory), handles)

    @classmethod
    def attach(cls, path: Path, layout: WeightLayout) -> WeightChannel:
        """Another process's end of the channel at ``path``.

        Raises:
            SharedMemoryError: no channel is there, it is damaged, or of another layout.
        """
        directory = WeightDirectory.open(path)
        if not _is_of(directory, layout):
            raise SharedMemoryError(
                f"{path} is for other weights: layout {directory.fingerprint.hex()[:16]}, not {layout.name}"
            )
        if directory.kind == "host":
            return cls(directory, layout, _file_memory(directory))
        memory = receive_memory(_socket_path(path))
        if len(memory) != 2 * directory.num_slots * layout.nbytes:
            raise SharedMemoryError(f"{path}: the device memory is another channel's")
        return cls(directory, layout, DeviceMemory(memory.view(2 * directory.num_slots, layout.nbytes)))

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
        """The channel's version; another than last time means that some slot changed. Takes under a microsecond.

        Raises:
            SharedMemoryError: there is none to read.
        """
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
            NonFiniteWeights: nobody should draft with these weights. ``tensors`` are as they were.
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
            if not self.buffers.is_finite():
                raise NonFiniteWeights(f"{self.directory.file.path}: slot {slot}: {state.key!r} has numbers not finite")
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


def _is_of(directory: WeightDirectory, layout: WeightLayout) -> bool:
    return (directory.fingerprint, directory.stride) == (layout.fingerprint, layout.nbytes)


def _file_memory(directory: WeightDirectory) -> FileMemory:
    return FileMemory(directory.file, directory.data_offset)


def _socket_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sock")
