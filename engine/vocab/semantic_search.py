"""Searches in the semantic index beside the step loop: asked for in one step, taken in a later one."""

from __future__ import annotations

import threading
import time
from queue import Empty, Full, Queue

import numpy as np
from numpy.typing import NDArray

from engine.vocab.semantic import SemanticIndex

_MAX_WAITING = 256


class SemanticSearch:
    """A thread that searches. A query too many is dropped: neighbours that come late are worth little.

    Args:
        index: what it searches.
    """

    def __init__(self, index: SemanticIndex) -> None:
        self._index = index
        self._queries: Queue[tuple[str, NDArray[np.float32]]] = Queue(_MAX_WAITING)
        self._found: Queue[tuple[str, list[int]]] = Queue()
        self.num_searches = 0
        self.seconds = 0.0
        """Spent searching so far."""
        threading.Thread(target=self._run, name="semantic search", daemon=True).start()

    def ask(self, request_id: str, hidden: NDArray[np.float32]) -> None:
        """Search for the neighbours of a hidden state [d]."""
        try:
            self._queries.put_nowait((request_id, hidden))
        except Full:
            return

    def take(self) -> list[tuple[str, list[int]]]:
        """What was found since the last call: whose it is, and tokens, the nearest first."""
        found = []
        while True:
            try:
                found.append(self._found.get_nowait())
            except Empty:
                return found

    def _run(self) -> None:
        while True:
            request_id, hidden = self._queries.get()
            started = time.perf_counter()
            token_ids = self._index.neighbours(hidden[None])[0]
            self.seconds += time.perf_counter() - started
            self.num_searches += 1
            self._found.put((request_id, token_ids[token_ids >= 0].tolist()))
