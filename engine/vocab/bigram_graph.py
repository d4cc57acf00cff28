"""The statistical index: which tokens follow which in text that the target generated (arXiv 2605.27390, S_graph)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.vocab.context_table import ContextTable
from engine.vocab.continuations import Continuations

MAX_OUT_DEGREE, MIN_COUNT, MIN_PROBABILITY = 64, 5, 1e-4
"""The paper's bounds on an edge u → v: its rank among u's, how often it was seen, p(v | u)."""
CONTINUATIONS = 16
"""How many followers of a token the prior looks at."""
LOG_PROB_SCALE = -1.0 / math.log(MIN_PROBABILITY)
"""The prior's value of a follower is 1 + log p times this."""
NEIGHBOURS_PER_SEED = 8
"""How many tokens each seed of an event brings (the paper's)."""
_GENERAL_WEIGHT = 8.0
"""The general graph counts as much as this many of a tenant's tokens."""


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

    def neighbours(self, token_id: int, limit: int = NEIGHBOURS_PER_SEED) -> NDArray[np.int32]:
        """[n <= limit]: what most likely follows a token."""
        start, end = self.offsets[token_id], self.offsets[token_id + 1]
        return self.token_ids[start : min(end, start + limit)]

    def continuations(self, token_ids: NDArray[np.int32], width: int = CONTINUATIONS) -> Continuations:
        """What follows each token, for the prior: 1 + log p / log(1 / ``MIN_PROBABILITY``), so 0 .. 1.

        Args:
            token_ids: [B]; -1 has no continuations.
            width: most of a token.
        """
        starts, ends = self.offsets[token_ids], self.offsets[token_ids + 1]
        places = starts[:, None] + np.arange(width)
        valid = (places < ends[:, None]) & (token_ids >= 0)[:, None]
        places[~valid] = 0
        if not len(self.token_ids):
            return Continuations(np.full(places.shape, -1, np.int32), np.zeros(places.shape, np.float32))
        values = 1.0 + self.log_probs[places] * np.float32(LOG_PROB_SCALE)
        return Continuations(
            np.where(valid, self.token_ids[places], np.int32(-1)), np.where(valid, values, np.float32(0.0))
        )

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


class TenantBigrams:
    """A tenant's own pairs, counted while it is served, over a general graph.

    p(v | u) is the tenant's share, with the general graph as ``_GENERAL_WEIGHT`` tokens seen before.

    Args:
        general: for all tenants; None to have the tenant's own only.
        num_rows: of the tenant's table, a power of 2.
        width: continuations of a token in it.
    """

    def __init__(self, general: BigramGraph | None, num_rows: int = 4096, width: int = 16) -> None:
        self._general, self._table = general, ContextTable(num_rows, width)

    def observe(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> None:
        """Count a run of verified tokens; ``before`` are the tokens right before them, of which the last counts."""
        for token_id, following in pairwise([*before[-1:], *token_ids]):
            self._table.add(token_id, following, 1.0)

    def neighbours(self, token_id: int, limit: int = NEIGHBOURS_PER_SEED) -> list[int]:
        """At most ``limit`` tokens, the most likely to follow first."""
        row = self._table.find(token_id)
        if row < 0:  # nearly all that an event asks for: in order already
            return [] if self._general is None else self._general.neighbours(token_id, limit).tolist()
        worth: dict[int, float] = {}
        if self._general is not None:
            start, end = self._general.offsets[token_id : token_id + 2].tolist()
            likely = self._general.token_ids[start:end].tolist()
            shares = (np.exp(self._general.log_probs[start:end]) * _GENERAL_WEIGHT).tolist()
            worth = dict(zip(likely, shares, strict=True))
        own = zip(self._table.token_ids[row].tolist(), self._table.counts[row].tolist(), strict=True)
        for following, count in own:
            if following >= 0:
                worth[following] = worth.get(following, 0.0) + count
        return sorted(worth, key=lambda following: (-worth[following], following))[:limit]
