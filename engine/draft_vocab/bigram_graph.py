"""The statistical index: which tokens follow which in text that the target generated (arXiv 2605.27390, S_graph)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from evospec.engine.models.config import ModelError
from evospec.kernels.session_options import GraphArrays

MAX_OUT_DEGREE, MIN_COUNT, MIN_PROBABILITY = 64, 5, 1e-4
"""The paper's bounds on an edge u → v: its rank among u's, how often it was seen, p(v | u)."""
_ARRAYS = {"offsets": "int64", "token_ids": "int32", "log_probs": "float32"}
"""Of a file."""


@dataclass(frozen=True)
class BigramGraph(GraphArrays):
    """Edges u → v; ``log_probs`` are log p(v | u), over all tokens that followed u, those that are no edge included."""

    width: int = 16
    scale: float = -1.0 / math.log(MIN_PROBABILITY)

    @property
    def vocab_size(self) -> int:
        """Token ids are below."""
        return len(self.offsets) - 1

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: getattr(self, name) for name in _ARRAYS}, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> BigramGraph:
        """Read what ``save`` wrote.

        Raises:
            ModelError: the file cannot be read, is inconsistent or over another vocabulary.
        """
        try:
            with safe_open(path, framework="np") as file:
                graph = cls(*map(file.get_tensor, _ARRAYS))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: no bigram graph: {error}") from error
        if graph.offsets.shape != (vocab_size + 1,):
            raise ModelError(f"{path}: a graph over {graph.offsets.size - 1} tokens, but the model has {vocab_size}")
        graph._check(path)
        return graph

    def _check(self, path: Path) -> None:
        num_edges = len(self.token_ids)
        sound = (
            all(getattr(self, name).dtype == dtype for name, dtype in _ARRAYS.items())
            and self.token_ids.shape == self.log_probs.shape == (num_edges,)
            and self.offsets[0] == 0
            and self.offsets[-1] == num_edges
            and bool((np.diff(self.offsets) >= 0).all())
            and (num_edges == 0 or 0 <= self.token_ids.min() <= self.token_ids.max() < self.vocab_size)
            and bool(np.isfinite(self.log_probs).all())
        )
        if not sound:
            raise ModelError(f"{path}: damaged bigram graph")


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
