"""When a batch's chains of drafts end before they are as long as they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sureness = Mapping[str, Sequence[int]]
"""Of the sequences whose draft knows it: how sure it is of each token that it has drafted, a level each."""


@dataclass(frozen=True)
class StopRule:
    """All chains end where another token of each promises less than it costs.

    A sequence's next draft promises the chance that it and all before it are accepted. Costs are seconds times the rate
    of tokens that the step promises: what could be had for them otherwise.
    """

    chances: NDArray[np.float32]
    """[T, 2, SURENESS_LEVELS]: that a tenant's greedy and sampled token is accepted, by how sure of it the draft is."""
    tenants: Mapping[str, int]
    """The number of each sequence's tenant among the T."""
    acceptance: Mapping[str, Sequence[float]]
    """Of each sequence by place, before it is drafted, given that those before it are accepted."""
    verify_costs: Sequence[float]
    """By place: of verifying one more token."""
    draft_cost: float
    """Of the batch's next draft tokens."""
    planned: Mapping[str, int]
    """Length for each sequence that is best on average, for drafts that know nothing of how sure they are."""
