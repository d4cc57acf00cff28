"""What follows a token, by the general graph and a tenant's own texts, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from evospec.engine.draft_vocab.bigram_graph import BigramGraph
from tests.reference.context_table import ContextTable
from tests.reference.continuations import Continuations

NEIGHBOURS_PER_SEED = 8
_GENERAL_WEIGHT = 8.0


def continuations(graph: BigramGraph, token_ids: NDArray[np.int32], width: int = BigramGraph.width) -> Continuations:
    """What follows each token, for the prior: 1 + log p / log(1 / ``MIN_PROBABILITY``), so 0 .. 1.

    Args:
        token_ids: [B]; -1 has no continuations.
        width: most of a token.
    """
    starts, ends = graph.offsets[token_ids], graph.offsets[token_ids + 1]
    places = starts[:, None] + np.arange(width)
    valid = (places < ends[:, None]) & (token_ids >= 0)[:, None]
    places[~valid] = 0
    if not len(graph.token_ids):
        return Continuations(np.full(places.shape, -1, np.int32), np.zeros(places.shape, np.float32))
    values = 1.0 + graph.log_probs[places] * np.float32(graph.scale)
    return Continuations(
        np.where(valid, graph.token_ids[places], np.int32(-1)), np.where(valid, values, np.float32(0.0))
    )


def neighbours(graph: BigramGraph, token_id: int, limit: int = NEIGHBOURS_PER_SEED) -> NDArray[np.int32]:
    """[n <= limit]: what most likely follows a token."""
    start, end = graph.offsets[token_id], graph.offsets[token_id + 1]
    return graph.token_ids[start : min(end, start + limit)]


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
            return [] if self._general is None else neighbours(self._general, token_id, limit).tolist()
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
