"""The worker's view of the engine's slots: which key is in which, and that they hold what they should."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog
import torch

from adapters.store import AdapterStore
from engine.ipc.shared_file import SharedMemoryError
from engine.ipc.weight_layout import WeightLayout
from engine.ipc.weight_writer import ChannelReplaced, WeightWriter

log = structlog.get_logger(__name__)


class AdapterBank:
    """Publishes adapters through a weight channel that may come, go, and be replaced with the engine.

    Args:
        path, layout: of the channel.
        store: remembers the channel's version, so that versions grow over restarts of everything.
    """

    def __init__(self, path: Path, layout: WeightLayout, store: AdapterStore) -> None:
        self._path, self._layout, self._store = path, layout, store
        self._writer: WeightWriter | None = None
        self._problem = ""

    @property
    def is_attached(self) -> bool:
        return self._writer is not None

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

    def slot(self, key: str) -> int | None:
        """Where a key is."""
        return next((index for index, found in enumerate(self._keys()) if found == key), None)

    def keys_in_force(self) -> list[str]:
        """Keys that have a slot."""
        return [key for key in self._keys() if key is not None]

    def publish(self, key: str, tensors: Mapping[str, torch.Tensor] | None) -> int | None:
        """Put weights in force for a key, None: the base draft.

        Returns:
            the version of the channel (0: the base draft); None where there is no sound channel, or no free slot.
        """
        slot = self.slot(key)
        if self._writer is None or (tensors is None and slot is None):
            return None if self._writer is None else 0
        if slot is None:
            slot = next((index for index, found in enumerate(self._keys()) if found is None), None)
        if slot is None:
            return None
        # First, so that a worker killed behind it never gives a version twice, even if the channel is lost with it.
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

    def _keys(self) -> list[str | None]:
        return [] if self._writer is None else [slot.key for slot in self._writer.slots]
