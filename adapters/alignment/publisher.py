"""Puts adapters into the engine's slots, wherever the engine has them now."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

import structlog
import torch

from evospec.adapters.alignment.store import AdapterStore
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.weight_channel import ChannelReplaced, WeightWriter
from evospec.engine.online.weight_layout import WeightLayout

log = structlog.get_logger(__name__)


class AdapterPublisher:
    """Publishes adapters through a weight channel that may come, go, and be replaced with the engine.

    Args:
        path, layout: where the channel is, and what is in its slots.
        store: remembers the channel's version, so that versions grow over restarts of everything.
    """

    def __init__(self, path: Path, layout: WeightLayout, store: AdapterStore) -> None:
        self._path, self._layout, self._store = path, layout, store
        self._writer: WeightWriter | None = None
        self._problem = ""

    @property
    def is_attached(self) -> bool:
        return self._writer is not None

    @property
    def slots(self) -> dict[str, int]:
        """The slot of each key that has one."""
        slots = [] if self._writer is None else self._writer.slots
        return {slot.key: index for index, slot in enumerate(slots) if slot.key is not None}

    def attach(self) -> bool:
        """Follow the engine to the channel it has now.

        Returns:
            whether it is another one than at the last call: what should be in force has to be published again.
        """
        if self._writer is not None and not self._writer.is_replaced():
            return False
        self.close()
        try:
            self._writer = WeightWriter(self._path, self._layout, self._store.channel_version)
        except SharedMemoryError as error:
            if str(error) != self._problem:  # one line for each reason
                self._problem = str(error)
                log.info("no weight channel to publish in", reason=self._problem)
            return False
        self._problem = ""
        log.info("weight channel attached", slots=len(self._writer.slots), version=self._writer.version)
        return True

    def publish(self, key: str, tensors: Mapping[str, torch.Tensor] | None) -> int | None:
        """Put weights in force for a key, None: the base draft.

        Returns:
            the version of the channel (0: the base draft); None where there is no sound channel, or no free slot.
        """
        if self._writer is None:
            return None
        slot = self.slots.get(key)
        if slot is None:
            if tensors is None:
                return 0
            slot = next((index for index, found in enumerate(self._writer.slots) if found.key is None), None)
        if slot is None:
            return None
        # First, so that a worker killed behind it never gives a version twice, even if the channel is lost with it.
        with suppress(OSError) if tensors is None else nullcontext():  # what is bad goes, full disk or not
            self._store.save_channel_version(self._writer.version + 1)
        try:
            version = self._writer.clear(slot) if tensors is None else self._writer.publish(slot, key, tensors)
        except ChannelReplaced:
            return None  # `attach` sees to it
        except SharedMemoryError as error:
            log.warning("the weight channel cannot be written", reason=str(error))
            return None  # the engine will see it as well, and make another
        return 0 if tensors is None else version

    def close(self) -> None:
        """Let another process publish."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
