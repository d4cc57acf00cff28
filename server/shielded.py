"""Work that goes on when whoever waits for it is cancelled, as a request is whose client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class ShieldedTasks:
    """Tasks that nobody cancels."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin ``work``, which nobody has to wait for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, which goes on if the caller is cancelled."""
        return await asyncio.shield(self.start(work))

    async def close(self) -> None:
        """Wait for all that is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
