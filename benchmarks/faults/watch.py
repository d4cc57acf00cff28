"""Looks at the versions of a server's adapters all the time: do they ever go back?"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager

from benchmarks.common.threads import beside
from benchmarks.faults.server import UNKNOWN, Server

_PERIOD_SECONDS = 0.25


class Versions:
    """What was seen of versions so far, over all servers that share a channel.

    A version denotes one publication, and is greater than all that were seen before it; the engine's version of a key
    only grows, or is gone while the key has the base draft.
    """

    def __init__(self) -> None:
        self.floors: dict[str, int] = {}
        """Greatest version that the engine drafted with, by key."""
        self.violations: list[str] = []
        self._keys: dict[int, str] = {}
        """Of each version seen in the channel."""

    @property
    def num_seen(self) -> int:
        return len(self._keys)

    def observe_channel(self, slots: Mapping[str, int]) -> None:
        """Versions of the keys that have a slot."""
        newest = max(self._keys, default=0)
        for key, version in slots.items():
            if version not in self._keys and version < newest:
                self.violations.append(f"version {version} of {key} came after {newest}")
            if self._keys.setdefault(version, key) != key:
                self.violations.append(f"version {version} was of {self._keys[version]}, then of {key}")

    def observe_engine(self, versions: Mapping[str, int]) -> None:
        """Versions by key that the engine drafts with."""
        for key, version in versions.items():
            if version < self.floors.get(key, 0):
                self.violations.append(f"the engine went from version {self.floors[key]} of {key} to {version}")
            self.floors[key] = max(version, self.floors.get(key, 0))

    def observe_answer(self, key: str, version: int, floor: int) -> None:
        """``version`` of an answer, 0: the base draft; ``floor`` was the engine's when the request was sent."""
        if 0 < version < floor:
            self.violations.append(f"an answer to {key} was drafted with version {version} after {floor}")


def watching(server: Server, versions: Versions) -> AbstractContextManager[None]:
    """Observes a server's versions as long as the block lasts."""

    def look(stopping: threading.Event) -> None:
        while not stopping.wait(_PERIOD_SECONDS):
            try:
                state = server.state()
            except UNKNOWN:
                continue  # just now there is nothing to see
            versions.observe_channel(state.in_channel)
            versions.observe_engine(state.in_engine)

    return beside(look)
