"""One token a row: the largest logit, or a sample of what top-k, top-p and min-p keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.messages import SamplingParams
from kernels.argmax import argmax_rows
from kernels.gumbel_argmax import gumbel_argmax, seeds_tensor, signed
from kernels.kept_thresholds import Limits, kept_thresholds
from kernels.native_chain import ChainSampling

if TYPE_CHECKING:
    from kernels.native import Team

# Dividing logits by less could overflow float32; the distribution is a single token long before.
_MIN_TEMPERATURE = 1e-5


def all_greedy(params: Sequence[SamplingParams]) -> bool:
    """Whether every row takes its largest logit."""
    return not any(map(warmth, params))


def warmth(params: SamplingParams) -> float:
    """Temperature, 0 where it makes no difference."""
    return 0.0 if params.temperature < _MIN_TEMPERATURE else params.temperature


def chain_sampling(params: Sequence[SamplingParams]) -> ChainSampling | None:
    """The same for compiled chains of drafts; None: all greedy."""
    if all_greedy(params):
        return None
    return ChainSampling(
        temperatures=[warmth(p) for p in params],
        seeds=[signed(p.seed, 64) for p in params],
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
    """The token of every row: the largest logit where greedy, else a Gumbel argmax over what is not cut off.

    Args:
        logits: [N, V] float32, or [N, K] for a subset of tokens.
        params: whose temperature, seed, top_k, top_p and min_p count, one a row.
        positions: index of the chosen token in its sequence, one a row.
        token_ids: [K] or [N, K] int32, the tokens that the columns stand for (None: 0 .. V - 1).
        team: threads of the compiled kernels (None: the calling one).
        allowed: [N, ceil(V / 32)] int32, bits of the columns that may be chosen (None: all).
    """
    if token_ids is None and allowed is None and all_greedy(params):
        return argmax_rows(logits)
    device = logits.device
    allowed = None if allowed is None else allowed.to(device)
    temperatures = torch.tensor([warmth(p) for p in params], dtype=torch.float32, device=device)
    seeds = seeds_tensor([p.seed for p in params], device)
    least = None
    if any(map(_is_truncated, params)):
        limits = Limits(
            torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device),
        )
        least = kept_thresholds(logits, temperatures, limits, allowed, team)
    places = torch.tensor(positions, dtype=torch.int64, device=device)
    columns = None if token_ids is None else token_ids.expand(len(logits), -1)
    choices = gumbel_argmax(
        logits, seeds, places, columns, temperatures=temperatures, least=least, allowed=allowed, team=team
    )
    return choices.tolist()


def _is_truncated(params: SamplingParams) -> bool:
    """Whether any token may be cut off."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
