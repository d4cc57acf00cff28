"""A router in front of a fleet, and what an operator does to the replicas behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from benchmarks.fleet.processes import Process


class Router(ABC):
    """In front of ``replicas``, or of as many of its own that keep their sessions at ``redis_url``."""

    def __init__(self, replicas: Sequence[Process], directory: Path, redis_url: str) -> None:
        self.replicas, self.directory, self.redis_url = replicas, directory, redis_url

    @abstractmethod
    def running(self) -> AbstractAsyncContextManager[str]:
        """Runs it; gives its URL once it has all replicas."""

    @abstractmethod
    async def kill(self, number: int) -> None:
        """Kill a replica with SIGKILL; return once it is back."""

    @abstractmethod
    async def update(self) -> None:
        """Replace all replicas, one after the other; return once all are new."""
