"""How requests' parameters say that tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.messages import SamplingParams
from kernels import choose_tokens as kernel
from kernels.choose_tokens import RowSampling
from kernels.native import Team

_MIN_TEMPERATURE = 1e-5
"""Less counts as 0: dividing logits by it could overflow float32, and only the largest has a chance long before."""


def all_greedy(params: Sequence[SamplingParams]) -> bool:
    """Whether every row takes its largest logit."""
    return max([one.temperature for one in params], default=0.0) < _MIN_TEMPERATURE


def row_sampling(params: Sequence[SamplingParams]) -> RowSampling | None:
    """The same for the kernels, one entry a row; None: all greedy."""
    if all_greedy(params):
        return None
    return RowSampling(
        temperatures=[0.0 if p.temperature < _MIN_TEMPERATURE else p.temperature for p in params],
        seeds=[p.seed for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
    )


def choose_tokens(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    token_ids: torch.Tensor | None = None,
    team: Team | None = None,
    allowed: torch.Tensor | None = None,
) -> list[int]:
    """As ``kernels.choose_tokens``, by parameters whose temperature, seed, top_k, top_p and min_p count, one a row."""
    return kernel.choose_tokens(logits, row_sampling(params), positions, token_ids, allowed, team)
