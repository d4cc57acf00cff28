"""Snapshots as the server sees them: checked before they are trusted, and merged; never looked into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from engine.draft_vocab.snapshot import MAX_BYTES, SessionSnapshot, SnapshotError, decode, encode, merge

Fault = Literal["oversized", "corrupt"]


@dataclass(frozen=True)
class SnapshotReader:
    """Reads the snapshots of one model: its tokens have the fingerprint ``vocabulary`` and ids below ``vocab_size``."""

    vocabulary: str
    vocab_size: int

    def find_fault(self, data: bytes) -> Fault | None:
        """Why ``data`` cannot be used; None if it can."""
        if len(data) > MAX_BYTES:
            return "oversized"
        try:
            self._decode(data)
        except SnapshotError:
            return "corrupt"
        return None

    def merge(self, base: bytes, snapshots: Sequence[bytes], on_fault: Callable[[Fault], None]) -> bytes | None:
        """What all of ``snapshots`` know as one; None if none of them can be used.

        ``base`` is what they started from (empty: nothing). ``on_fault`` is told of each that cannot be used.
        """
        sound = []
        for data in snapshots:
            fault = self.find_fault(data)
            if fault is None:
                sound.append(data)
            else:
                on_fault(fault)
        if len(sound) < 2:
            return sound[0] if sound else None
        start = self._decode(base) if base else None
        return encode(reduce(lambda a, b: merge(a, b, start), map(self._decode, sound)))

    def _decode(self, data: bytes) -> SessionSnapshot:
        return decode(data, self.vocabulary, self.vocab_size)
