"""Room for request bodies: a tenant's bodies in the process have bounds of bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.engine_client import Overloaded

MAX_WAITING = 512
"""Requests of a tenant that wait for room."""


@dataclass
class _Room:
    used: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class BodyRoom:
    """``size`` bytes for the bodies of each tenant, given in the order in which they were asked for.

    Nothing of a body is read until there is room for all of it: bodies that are read in part each could leave none of
    them room for the rest. What the client sends meanwhile is held back by its connection's flow control.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rooms: dict[str, _Room] = {}

    @asynccontextmanager
    async def hold(self, tenant: str, size: int) -> AsyncIterator[None]:
        """Hold room for ``size`` bytes as long as the block lasts. Raises ``Overloaded`` where too many wait."""
        room = self._rooms.setdefault(tenant, _Room())
        if room.waiting or room.used + size > self._size:
            await self._wait(room, size)
        else:
            room.used += size
        try:
            yield
        finally:
            room.used -= size
            self._admit(room)

    async def _wait(self, room: _Room, size: int) -> None:
        if len(room.waiting) >= MAX_WAITING:
            raise Overloaded
        turn = size, asyncio.get_running_loop().create_future()
        room.waiting.append(turn)
        try:
            await turn[1]
        except asyncio.CancelledError:
            if turn in room.waiting:
                room.waiting.remove(turn)
            else:
                room.used -= size
            self._admit(room)
            raise

    def _admit(self, room: _Room) -> None:
        """Let in those who wait, as many as there is room for."""
        while room.waiting and room.used + room.waiting[0][0] <= self._size:
            size, turn = room.waiting.popleft()
            room.used += size
            if not turn.done():  # else its caller was cancelled, and gives the room back
                turn.set_result(None)
