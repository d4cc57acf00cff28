"""The worker's end of a weight channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from engine.online.adapter_control import MAX_KEY_BYTES
from engine.online.shared_file import SharedMemoryError
from engine.online.weight_channel import WeightChannel
from engine.online.weight_directory import Slot
from engine.online.weight_layout import WeightLayout


class ChannelReplaced(SharedMemoryError):
    """The engine made a new channel. Attach to it, and publish again what should be in force."""


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
