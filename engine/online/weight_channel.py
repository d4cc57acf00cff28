"""Draft weights that a worker publishes and the engine takes over between two steps.

The engine makes the channel and reads it (``WeightChannel``); the worker attaches to it and writes (``WeightWriter``).
The memory is the engine's, so nothing that becomes of the worker can take it away.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from evospec.engine.online.adapter_control import MAX_KEY_BYTES
from evospec.engine.online.cuda_memory import HandleServer, receive_memory
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.weight_directory import Slot, WeightDirectory
from evospec.engine.online.weight_layout import DeviceMemory, FileMemory, WeightBuffers, WeightLayout

_ATTEMPTS = 4
_CPU = torch.device("cpu")


class NonFiniteWeights(SharedMemoryError):
    """What was published arrived whole and has numbers that are infinite or none. The channel itself is sound."""


class ChannelReplaced(SharedMemoryError):
    """The engine made a new channel. Attach to it, and publish again what should be in force."""


class WeightChannel:
    """Slots of equal layout, each with a key and a version, each doubly buffered.

    What a reader gets is a whole published version or an exception: each copy is checked against the checksum it was
    published with, against the slot having changed meanwhile, and for numbers that are not finite. Use ``create`` or
    ``attach``. All methods raise ``SharedMemoryError`` where the channel is damaged, or not there.
    """

    def __init__(
        self,
        directory: WeightDirectory,
        layout: WeightLayout,
        memory: torch.Tensor | None = None,
        handles: HandleServer | None = None,
    ) -> None:
        self.directory, self.layout, self._handles = directory, layout, handles
        in_file = FileMemory(directory.file, directory.data_offset)
        self.buffers = WeightBuffers(layout, in_file if memory is None else DeviceMemory(memory))

    @classmethod
    def create(cls, path: Path, layout: WeightLayout, num_slots: int, device: torch.device = _CPU) -> WeightChannel:
        """The engine's end of a channel in the shared file at ``path``, with its buffers on ``device``.

        For a CUDA device a Unix socket beside the file gives them to others. On the CPU a channel that an engine before
        left there is taken over with all it holds, if it fits. Otherwise a new one takes its place (versions go on from
        the old one's where that can be read), and the worker finds out at its next publication.
        """
        version = 0
        with suppress(SharedMemoryError):
            old = WeightDirectory.open(path)
            is_same = (old.kind, old.num_slots) == ("host", num_slots) and _is_of(old, layout)
            if device.type == "cpu" and is_same:
                return cls(old, layout)
            version = old.sound_version
        return cls._make(path, layout, num_slots, device, version)

    @classmethod
    def _make(
        cls, path: Path, layout: WeightLayout, num_slots: int, device: torch.device, version: int
    ) -> WeightChannel:
        if device.type == "cpu":
            return cls(WeightDirectory.create(path, layout, num_slots, "host", version), layout)
        memory = torch.zeros(2 * num_slots, layout.nbytes, dtype=torch.uint8, device=device)
        handles = HandleServer(memory, _socket_path(path))
        return cls(WeightDirectory.create(path, layout, num_slots, "cuda", version), layout, memory, handles)

    @classmethod
    def attach(cls, path: Path, layout: WeightLayout) -> WeightChannel:
        """Another process's end of the channel at ``path``; ``SharedMemoryError``, too, if it is of another layout."""
        directory = WeightDirectory.open(path)
        if not _is_of(directory, layout):
            raise SharedMemoryError(
                f"{path} is for other weights: layout {directory.fingerprint.hex()[:16]}, not {layout.name}"
            )
        if directory.kind == "host":
            return cls(directory, layout)
        memory = receive_memory(_socket_path(path))
        if len(memory) != 2 * directory.num_slots * layout.nbytes:
            raise SharedMemoryError(f"{path}: the device memory is another channel's")
        return cls(directory, layout, memory.view(2 * directory.num_slots, layout.nbytes))

    def replace(self, version: int) -> WeightChannel:
        """A channel of empty slots in place of this one, which is damaged; for the engine alone.

        The worker finds out as it does with a new engine's, and publishes again. ``version``: the new one's at first.
        If it cannot be made, this one stays.
        """
        path, num_slots = self.directory.file.path, self.directory.num_slots
        channel = self._make(path, self.layout, num_slots, self.buffers.device, version)
        self.close()
        return channel

    def is_replaced(self) -> bool:
        """Whether nobody can find it any more: its file was deleted, or another is in its place."""
        return self.directory.file.is_replaced()

    def poll(self) -> int:
        """The channel's version; another than last time means that some slot changed. Takes under a microsecond."""
        return self.directory.version

    def slots(self) -> tuple[Slot, ...]:
        """Key and version of every slot."""
        return self.directory.slots()

    @torch.inference_mode()
    def read_into(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> Slot:
        """Copy what a slot holds, as is returned, into ``tensors``, in place; an empty slot leaves them as they are.

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
        """Stop giving the memory to others, and let go of the file, which stays in place for a successor."""
        if self._handles is not None:
            self._handles.close()
        self.directory.file.close()


class WeightWriter:
    """Publishes versions; the only process that does.

    It keeps the directory itself, so a publication also repairs one that was damaged.

    Args:
        path, layout: as in ``WeightChannel.attach``.
        version: versions published are greater than this one, also where the channel is a new one.

    Raises:
        SharedMemoryError: as in ``WeightChannel.attach``, or another process is the writer.
    """

    def __init__(self, path: Path, layout: WeightLayout, version: int = 0) -> None:
        self._channel = WeightChannel.attach(path, layout)
        try:
            self._channel.directory.file.lock()
            self.slots: list[Slot] = list(self._channel.slots())
            """What the channel holds, by slot."""
        except SharedMemoryError:
            self._channel.close()
            raise
        self.version = max(version, self._channel.directory.sound_version)

    @torch.inference_mode()
    def publish(self, slot: int, key: str, tensors: Mapping[str, torch.Tensor]) -> int:
        """Put weights in force, in place of what the slot held; their version, greater than all before it.

        Raises:
            ChannelReplaced: nobody would read them here.
            SharedMemoryError: the channel is damaged so that they cannot be written; the engine will replace it.
            ValueError: ``tensors`` are of another layout, the key is longer than ``MAX_KEY_BYTES`` or in another slot.
        """
        self._channel.layout.check(tensors)
        if not 0 < len(key.encode()) <= MAX_KEY_BYTES:
            raise ValueError(f"a key has 1 to {MAX_KEY_BYTES} bytes, this one has {len(key.encode())}")
        if any(state.key == key for other, state in enumerate(self.slots) if other != slot):
            raise ValueError(f"another slot already holds {key!r}")
        buffer = 1 - self.slots[slot].buffer
        checksum = self._channel.buffers.write(2 * slot + buffer, tensors)
        return self._commit(slot, Slot(key, self.version + 1, buffer, checksum))

    def clear(self, slot: int) -> int:
        """Empty a slot; the version in which it is empty. Raises as ``publish`` does."""
        return self._commit(slot, Slot(None, self.version + 1, self.slots[slot].buffer))

    def is_replaced(self) -> bool:
        """Whether the engine made another channel, so that nobody reads this one: for the worker's loop to look at."""
        return self._channel.is_replaced()

    def close(self) -> None:
        """Let another process write."""
        self._channel.close()

    def _commit(self, slot: int, state: Slot) -> int:
        if self.is_replaced():
            raise ChannelReplaced(f"{self._channel.directory.file.path} is another channel now")
        slots = self.slots.copy()
        slots[slot] = state
        self._channel.directory.commit(state.version, tuple(slots))
        self.slots, self.version = slots, state.version
        return state.version


def _is_of(directory: WeightDirectory, layout: WeightLayout) -> bool:
    return (directory.fingerprint, directory.stride) == (layout.fingerprint, layout.nbytes)


def _socket_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sock")
