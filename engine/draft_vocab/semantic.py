"""The semantic index: the head rows nearest to a hidden state (arXiv 2605.27390, S_sem(h_t)).

The inner product of a row and a hidden state is their logit, but HNSW graphs search by distance. So each row x gets one
more coordinate, sqrt(m² - |x|²) with m the largest norm: all rows then have norm m, a query (which gets 0 there) has
|q - x|² = |q|² + m² - 2 q·x, and the nearest rows are those with the largest logits.
"""

from __future__ import annotations

import os
import threading
from hashlib import blake2b
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from evospec.engine.request import Request

CONNECTIVITY = 32
"""M of the graph (the paper's)."""
NEIGHBOURS = 10
"""Neighbours of a hidden state at an event (the paper's)."""
_EXPANSION_ADD, _EXPANSION_SEARCH = 256, 256


class SemanticIndex:
    """Approximate search over head rows. Searching releases the interpreter, so a thread of its own delays no step.

    Args:
        index: over augmented rows of norm 1, keyed by token id.
    """

    def __init__(self, index: Index) -> None:
        self._index = index

    def neighbours(self, hidden: NDArray[np.float32], k: int = NEIGHBOURS) -> list[int]:
        """The ``k`` tokens with about the largest logits of a hidden state [d], best first; all of fewer."""
        norm = max(np.linalg.norm(hidden), np.finfo(np.float32).tiny)
        keys: list[int] = self._index.search(np.append(hidden / norm, np.float32(0.0)), k, threads=1).keys.tolist()
        return keys


def open_semantic_index(
    directory: Path, token_ids: NDArray[np.int64], rows: NDArray[np.float32], threads: int
) -> SemanticIndex:
    """The index of some rows of a head, memory-mapped from its file; built first if there is none that can be read.

    Args:
        directory: beside the model; made if need be.
        token_ids: [n].
        rows: [n, d] of these tokens. For a large vocabulary building takes minutes.
        threads: to build with.

    Raises:
        OSError: the directory cannot be written.
    """
    fingerprint = blake2b(rows.tobytes() + token_ids.tobytes(), digest_size=16).hexdigest()
    path = directory / f"semantic-{fingerprint}.usearch"
    index = _open(path)
    if index is None:
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        _build(token_ids, rows, threads).save(str(unfinished))
        unfinished.replace(path)
        index = _open(path)
        if index is None:
            raise OSError(f"{path}: cannot be read after it was written")
    return SemanticIndex(index)


def _build(token_ids: NDArray[np.int64], rows: NDArray[np.float32], threads: int) -> Index:
    squares = np.square(rows).sum(axis=1)
    largest = np.float32(max(squares.max(initial=0.0), np.finfo(np.float32).tiny))
    augmented = np.column_stack([rows, np.sqrt(largest - squares)]) / np.sqrt(largest)
    index = Index(
        ndim=augmented.shape[1],
        metric="l2sq",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
        expansion_search=_EXPANSION_SEARCH,
    )
    index.add(token_ids.astype(np.uint64), augmented.astype(np.float32), threads=threads)
    return index


def _open(path: Path) -> Index | None:
    """Memory-map a saved index; None if there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        index: Any = Index.restore(str(path), view=True, expansion_search=_EXPANSION_SEARCH)
    except (RuntimeError, ValueError):
        return None
    return index if isinstance(index, Index) else None


_MAX_WAITING = 256


class SemanticSearch:
    """A thread that searches. A query too many is dropped: neighbours that come late are worth little."""

    def __init__(self, index: SemanticIndex) -> None:
        self._index = index
        self._queries: Queue[tuple[Request, NDArray[np.float32]]] = Queue(_MAX_WAITING)
        self._found: Queue[tuple[Request, list[int]]] = Queue()
        threading.Thread(target=self._run, name="semantic search", daemon=True).start()

    def ask(self, request: Request, hidden: NDArray[np.float32]) -> None:
        """Search for the neighbours of a hidden state [d] of a sequence."""
        try:
            self._queries.put_nowait((request, hidden))
        except Full:
            return

    def take(self) -> list[tuple[Request, list[int]]]:
        """What was found since the last call: whose it is, and tokens, the nearest first."""
        found = []
        while True:
            try:
                found.append(self._found.get_nowait())
            except Empty:
                return found

    def _run(self) -> None:
        while True:
            request, hidden = self._queries.get()
            self._found.put((request, self._index.neighbours(hidden)))
