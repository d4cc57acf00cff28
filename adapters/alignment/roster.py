"""Which adapter keys have an aligner: as many as the engine has slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import structlog

from adapters.alignment.aligner import KeyAligner

log = structlog.get_logger(__name__)

_IDLE_SECONDS = 60.0


class Roster:
    """The aligners by key. One leaves for a newcomer only when its key was silent for a minute.

    If the one heard of least recently always made room, then of more busy keys than slots each would leave before it
    had learned anything. What counts is when records were logged, not when they are read: after a long scoring all keys
    were silent to the worker.

    Args:
        num_slots: how many aligners there may be at a time.
        make: makes an aligner for a key.
        leave: is told which aligner has left.
    """

    def __init__(
        self, num_slots: int, make: Callable[[str], KeyAligner], leave: Callable[[str, KeyAligner], None]
    ) -> None:
        self._num_slots, self._make, self._leave = num_slots, make, leave
        self.aligners: OrderedDict[str, KeyAligner] = OrderedDict()  # least recently heard of first
        self._heard_at: dict[str, float] = {}
        self._has_warned = False

    def hear(self, key: str, at: float) -> KeyAligner | None:
        """The aligner of a key that was heard of ``at`` seconds of the epoch; None: there is no room for one."""
        if key not in self.aligners:
            if not self._has_room(at):
                if not self._has_warned:
                    log.warning("more busy adapter keys than slots, records are left out", key=key)
                    self._has_warned = True
                return None
            self._has_warned = False
            self.aligners[key] = self._make(key)
        self.aligners.move_to_end(key)
        self._heard_at[key] = max(at, self._heard_at.get(key, at))  # records of a batch may be told twice
        return self.aligners[key]

    def _has_room(self, now: float) -> bool:
        """Whether there is room for another key, made if that is possible."""
        if len(self.aligners) < self._num_slots:
            return True
        key = next(iter(self.aligners))
        if now - self._heard_at[key] < _IDLE_SECONDS:
            return False
        self._leave(key, self.aligners[key])  # first: where the disk is full, it stays
        del self.aligners[key], self._heard_at[key]
        return True
