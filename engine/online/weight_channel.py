"""Draft weights that a worker publishes and the engine takes over between two steps.

The engine makes the channel and reads it; the worker attaches to it and writes. Its file is the engine's, so nothing
that becomes of the worker can take it away:

    channel = WeightChannel.create(path, WeightLayout.of(tensors), num_slots=8)
    ...
    if channel.poll() != seen:                      # every step
        slots = channel.slots()
        channel.read_into(0, tensors)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.online.adapter_control import MAX_KEY_BYTES
from engine.online.shared_file import SharedMemoryError
from engine.online.weight_directory import Slot, WeightDirectory
from engine.online.weight_layout import WeightLayout

_ATTEMPTS = 4


class NonFiniteWeights(SharedMemoryError):
    """What was published arrived whole and has numbers that are infinite or none. The channel itself is sound."""


class ChannelReplaced(SharedMemoryError):
    """The engine made a new channel. Attach to it, and publish again what should be in force."""


class WeightChannel:
    """Slots of equal layout, each with a key and a version, each doubly buffered.

    What a reader gets is a whole published version or an exception: each copy is checked against the checksum it was
    published with, against the slot having changed meanwhile, and for numbers that are not finite. What is in the file
    may change or go away at any moment, so all is done with a copy of one buffer. Use ``create`` or ``attach``.
    """

    def __init__(self, directory: WeightDirectory, layout: WeightLayout) -> None:
        self.directory, self.layout = directory, layout
        self._staging = torch.zeros(layout.nbytes, dtype=torch.uint8)
        self._staged = layout.views(self._staging)

    @classmethod
    def create(cls, path: Path, layout: WeightLayout, num_slots: int) -> WeightChannel:
        """The engine's end of a channel.

        A channel that an engine before left at ``path`` is taken over with all it holds, if it fits. Otherwise a new
        one takes its place (versions go on from the old one's where that can be read), and the worker finds out at its
        next publication.

        Raises:
            SharedMemoryError: there is no room, or the path cannot be written.
        """
        version = 0
        try:
            old = WeightDirectory.open(path)
        except SharedMemoryError:
            pass
        else:
            if old.num_slots == num_slots and old.is_of(layout):
                return cls(old, layout)
            version = old.sound_version
        return cls(WeightDirectory.create(path, layout, num_slots, version), layout)

    @classmethod
    def attach(cls, path: Path, layout: WeightLayout) -> WeightChannel:
        """Another process's end of the channel at ``path``.

        Raises:
            SharedMemoryError: no channel is there, it is damaged, or of another layout.
        """
        directory = WeightDirectory.open(path)
        if not directory.is_of(layout):
            raise SharedMemoryError(
                f"{path} is for other weights: layout {directory.fingerprint.hex()[:16]}, "
                f"not {layout.fingerprint.hex()[:16]}"
            )
        return cls(directory, layout)

    def replace(self, version: int) -> WeightChannel:
        """A channel of empty slots in place of this one, which is damaged; for the engine alone.

        The worker finds out as it does with a new engine's, and publishes again. ``version``: the new one's at first.

        Raises:
            SharedMemoryError: it cannot be made; this one stays.
        """
        old = self.directory
        channel = WeightChannel(WeightDirectory.create(old.file.path, self.layout, old.num_slots, version), self.layout)
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
            staging = self._staging.numpy().data
            self.directory.file.read_into(self.directory.buffer_offset(2 * slot + state.buffer), staging)
            if self.slots()[slot] != state:
                continue
            if zlib.crc32(staging) != state.checksum:
                raise SharedMemoryError(f"{self.directory.file.path}: slot {slot}: wrong checksum")
            if not _is_finite(self._staged):
                raise NonFiniteWeights(f"{self.directory.file.path}: slot {slot}: {state.key!r} has numbers not finite")
            _copy(self._staged, tensors)
            return state
        raise SharedMemoryError(f"{self.directory.file.path}: slot {slot} changes faster than it can be read")

    def fill(self, buffer: int, tensors: Mapping[str, torch.Tensor]) -> int:
        """Put weights into a buffer; their checksum, once all of it has arrived. Raises ``SharedMemoryError``."""
        _copy(tensors, self._staged)
        content = self._staging.numpy().data
        self.directory.file.write(self.directory.buffer_offset(buffer), content)
        return zlib.crc32(content)

    def close(self) -> None:
        """Stop using the file. It stays in place for a successor."""
        self.directory.file.close()


def _copy(sources: Mapping[str, torch.Tensor], destinations: Mapping[str, torch.Tensor]) -> None:
    for name, destination in destinations.items():
        destination.copy_(sources[name])


def _is_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all numbers are."""
    numbers = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    return all(bool(torch.stack(torch.aminmax(tensor)).isfinite().all()) for tensor in numbers)


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
        """Put weights in force, in place of what the slot held.

        Returns:
            their version, greater than all before it.

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
        checksum = self._channel.fill(2 * slot + buffer, tensors)
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
