"""Writes of a step to the tails' memory, gathered so that they are made at once, between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.vocab.replacement import SlotWrite


class TailMemory(Protocol):
    """Where the head rows of tails are; see ``kernels.draft_head.TailSlabs``."""

    def write(self, slab: Sequence[int], slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Put tokens into slots, each of the slab named."""
        ...

    def clear(self, slab: int) -> None:
        """Empty a slab."""
        ...


class TailWriter:
    """Holds writes back until ``flush``.

    Args:
        memory: of the tails; None where there are none, and so nothing to write.
    """

    def __init__(self, memory: TailMemory | None) -> None:
        self._memory = memory
        self._tokens: dict[tuple[int, int], int] = {}

    def put(self, slab: int, writes: Iterable[SlotWrite]) -> None:
        """Change slots of a slab; the last write to a slot counts."""
        for slot, token_id in writes:
            self._tokens[slab, slot] = token_id

    def clear(self, slab: int) -> None:
        """Empty a slab now; what was to be written there is dropped."""
        self._tokens = {place: token_id for place, token_id in self._tokens.items() if place[0] != slab}
        if self._memory is not None:
            self._memory.clear(slab)

    def flush(self) -> None:
        """Make all writes."""
        if self._tokens and self._memory is not None:
            slabs, slots = zip(*self._tokens, strict=True)
            self._memory.write(slabs, slots, list(self._tokens.values()))
            self._tokens.clear()
