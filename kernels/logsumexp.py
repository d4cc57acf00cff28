"""Log of the sum of exponentials of every row: what turns logits into log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import native_sampling

if TYPE_CHECKING:
    from kernels.native import Team


def logsumexp_rows(logits: torch.Tensor, team: Team | None = None) -> torch.Tensor:
    """[N, V] float32 → [N] float64; ``team``: threads of the compiled kernels (None: the calling one)."""
    if native_sampling.can_take(logits):
        return native_sampling.logsumexp_rows(logits, team)
    return logits.logsumexp(dim=1).double()
