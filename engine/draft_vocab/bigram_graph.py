"""The statistical index: which tokens follow which in text that the target generated (arXiv 2605.27390, S_graph)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kernels.session_options import GraphArrays

MAX_OUT_DEGREE, MIN_COUNT, MIN_PROBABILITY = 64, 5, 1e-4
"""The paper's bounds on an edge u → v: its rank among u's, how often it was seen, p(v | u)."""
CONTINUATIONS = 16
"""How many followers of a token the prior looks at."""
LOG_PROB_SCALE = -1.0 / math.log(MIN_PROBABILITY)
"""The prior's value of a follower is 1 + log p times this."""


class BigramGraphError(ValueError):
    """A file is not a bigram graph, or is one over another vocabulary."""


@dataclass(frozen=True)
class BigramGraph:
    """Edges u → v in compressed rows, the most likely first.

    ``offsets`` [vocab + 1] int64: edges of u are offsets[u] .. offsets[u + 1] - 1. ``token_ids`` [edges] int32: v.
    ``log_probs`` [edges] float32: log p(v | u), over all tokens that followed u, those that are no edge included.
    """

    offsets: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]

    @property
    def vocab_size(self) -> int:
        """Token ids are below."""
        return len(self.offsets) - 1

    def arrays(self) -> GraphArrays:
        """As sessions take it."""
        return GraphArrays(self.offsets, self.token_ids, self.log_probs, CONTINUATIONS, LOG_PROB_SCALE)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        arrays: dict[str, NDArray[Any]] = {"offsets": self.offsets, "token_ids": self.token_ids}
        arrays["log_probs"] = self.log_probs
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(arrays, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> BigramGraph:
        """Read what ``save`` wrote.

        Raises:
            BigramGraphError: the file cannot be read, is inconsistent or over another vocabulary.
        """
        try:
            with safe_open(path, framework="np") as file:
                graph = cls(*(file.get_tensor(name) for name in ("offsets", "token_ids", "log_probs")))
        except (OSError, SafetensorError) as error:
            raise BigramGraphError(f"{path}: no bigram graph: {error}") from error
        if graph.offsets.shape != (vocab_size + 1,):
            raise BigramGraphError(
                f"{path}: a graph over {graph.offsets.size - 1} tokens, but the model has {vocab_size}"
            )
        graph._check(path)
        return graph

    def _check(self, path: Path) -> None:
        num_edges = len(self.token_ids)
        sound = (
            [str(array.dtype) for array in (self.offsets, self.token_ids, self.log_probs)]
            == ["int64", "int32", "float32"]
            and self.token_ids.shape == self.log_probs.shape == (num_edges,)
            and self.offsets[0] == 0
            and self.offsets[-1] == num_edges
            and bool((np.diff(self.offsets) >= 0).all())
            and (num_edges == 0 or 0 <= self.token_ids.min() <= self.token_ids.max() < self.vocab_size)
            and bool(np.isfinite(self.log_probs).all())
        )
        if not sound:
            raise BigramGraphError(f"{path}: damaged bigram graph")


def build_bigram_graph(sequences: Iterable[NDArray[np.int32]], vocab_size: int) -> BigramGraph:
    """Count pairs within each sequence and keep the edges within the paper's bounds.

    Args:
        sequences: token ids, each a text of its own. The pairs of all of them are held at once, 8 bytes each.
        vocab_size: token ids are below.
    """
    pairs = [sequence[:-1].astype(np.int64) * vocab_size + sequence[1:] for sequence in sequences]
    keys, counts = np.unique(np.concatenate([np.empty(0, np.int64), *pairs]), return_counts=True)
    sources, targets = np.divmod(keys, vocab_size)
    probabilities = counts / np.bincount(sources, counts, vocab_size)[sources]
    kept = (counts >= MIN_COUNT) & (probabilities >= MIN_PROBABILITY)
    sources, targets, probabilities = sources[kept], targets[kept], probabilities[kept]
    order = np.lexsort((targets, -probabilities, sources))
    sources, targets, probabilities = sources[order], targets[order], probabilities[order]
    ranks = np.arange(len(sources)) - np.searchsorted(sources, sources)
    kept = ranks < MAX_OUT_DEGREE
    offsets = np.concatenate([[0], np.cumsum(np.bincount(sources[kept], minlength=vocab_size))])
    return BigramGraph(offsets, targets[kept].astype(np.int32), np.log(probabilities[kept]).astype(np.float32))
