"""The tokens that may follow, by some statistic: what n-gram tables and the bigram graph give to the prior."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Continuations:
    """For each of B contexts, up to W tokens that followed it, each once.

    ``token_ids`` [B, W] int32 is -1 where there is none; ``values`` [B, W] float32 is how strongly the statistic
    speaks for each, above 0, and 0 where there is none.
    """

    token_ids: NDArray[np.int32]
    values: NDArray[np.float32]

    def at(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, C] tokens → [B, C] their values, 0 for those that are not among the continuations."""
        same = token_ids[:, :, None] == self.token_ids[:, None, :]
        values: NDArray[np.float32] = np.matmul(same.astype(np.float32), self.values[:, :, None])[:, :, 0]
        return values
