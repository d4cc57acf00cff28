"""Room for request bodies: a tenant's bodies in the process have bounds of bytes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from evospec.server.engine_client import Overloaded

MAX_WAITING = 512
"""Requests of a tenant that wait for room."""


@dataclass
class _Room:
    used: int = 0
    num_waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one who is next; others queue for it in their order."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class BodyRoom:
    """``size`` bytes for the bodies of each tenant, given in the order in which they were asked for.

    Nothing of a body is read until there is room for all of it: bodies that are read in part each could leave none of
    them room for the rest. What the client sends meanwhile is held back by its connection's flow control.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rooms: defaultdict[str, _Room] = defaultdict(_Room)

    @asynccontextmanager
    async def hold(self, tenant: str, size: int) -> AsyncIterator[Callable[[int], None]]:
        """Hold room for ``size`` bytes as long as the block lasts, or for less once the block calls what it is given.

        Raises ``Overloaded`` where too many wait.
        """
        room = self._rooms[tenant]
        if room.num_waiting >= MAX_WAITING:
            raise Overloaded
        room.num_waiting += 1
        try:
            async with room.turn:
                while room.used + size > self._size:
                    room.freed.clear()
                    await room.freed.wait()
                room.used += size
        finally:
            room.num_waiting -= 1
        held = size

        def shrink(size: int) -> None:
            nonlocal held
            room.used -= held - size
            held = size
            room.freed.set()

        try:
            yield shrink
        finally:
            shrink(0)
