"""What draft vocabularies are made of, and how their options are put to the sessions' kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evospec.engine.config import DynamicConfig
from evospec.engine.draft_vocab.bigram_graph import BigramGraph
from evospec.kernels.head_rows import TailMemory
from evospec.kernels.session_options import SessionOptions

if TYPE_CHECKING:
    from evospec.engine.draft_vocab.semantic import SemanticIndex

LIGHT_DRAFT_WEIGHTS = (0.5, 0.5, 1.0, 0.2, 1.5)
"""[NUM_FEATURES]: of ``prior`` fixed, and where the first session of a tenant begins with a light draft."""
_MIN_TENANTS = 64
"""With a table of half a MiB each."""


def core_mask(vocab_size: int, token_ids: NDArray[np.int64] | None) -> NDArray[np.bool_]:
    """[vocab]: whether each token is in a core of ``token_ids``; None: all are."""
    mask = np.full(vocab_size, token_ids is None)
    if token_ids is not None:
        mask[token_ids] = True
    return mask


@dataclass(frozen=True)
class Resources:
    """What the vocabularies of a model are made of."""

    core: NDArray[np.bool_]
    """[vocab]: the tokens that every sequence can draft."""
    fingerprint: str
    """Of the model's tokens."""
    tails: TailMemory | None = None
    """Of ``DynamicConfig.max_sessions`` sequences, and one more, always empty, for the others."""
    graph: BigramGraph | None = None
    semantic: SemanticIndex | None = None
    start_weights: Sequence[float] | None = None
    """[NUM_FEATURES]: where the prior of a tenant's first session starts; None: at zeros."""

    @property
    def slots(self) -> int:
        """Tokens in each tail; 0: there are none."""
        return 0 if self.tails is None else self.tails.slots


def session_options(options: DynamicConfig, slots: int) -> SessionOptions:
    """How sessions learn, and what fills their tails of ``slots`` tokens."""
    order = options.prior_order
    return SessionOptions(
        num_sessions=options.max_sessions,
        num_places=slots,
        only_recency=options.replacement == "lru",
        in_context=options.in_context,
        learns=options.prior == "learned",
        uses=(True, order >= 2, order >= 3, True, True),
        # No step has more tenants than sessions, so none loses its table within one.
        num_tenants=max(_MIN_TENANTS, options.max_sessions) if options.graph and slots else 0,
    )
