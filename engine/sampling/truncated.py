"""Sampling from a truncated distribution: top-k, then top-p, then min-p.

All three keep the tokens whose logit reaches some threshold, so a row needs its largest logits only.
Tokens that tie with the last one kept are kept as well: bfloat16 logits tie often, and the kept set
must not depend on how a sort orders equals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.messages import SamplingParams
from kernels.gumbel_argmax import gumbel_argmax

# How many of a row's largest logits to look at: few first, all at last.
_FEW, _MANY = 256, 4096
_ROOM_FOR_TIES = 16


def is_truncated(params: SamplingParams) -> bool:
    """Whether any token may be cut off."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


@dataclass(frozen=True)
class _Limits:
    """Per-row limits, each [N]; a limit that is off is the vocabulary size, 1 and -inf."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor

    @classmethod
    def of(cls, params: list[SamplingParams], vocab_size: int, device: torch.device) -> _Limits:
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        log_min_p = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
        return cls(
            torch.tensor(top_k, device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            torch.tensor(log_min_p, dtype=torch.float32, device=device),
        )

    def __getitem__(self, rows: torch.Tensor) -> _Limits:
        return _Limits(self.top_k[rows], self.top_p[rows], self.log_min_p[rows])


def truncated_argmax(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, params: list[SamplingParams]
) -> torch.Tensor:
    """One Gumbel-max sample per row among the tokens that its top_k, top_p and min_p keep.

    Looks at some hundred candidates first, and at more only in rows where those do not hold every kept token.

    Args:
        logits: [N, V] float32, already divided by the temperature.
        seeds: [N] int64.
        positions: [N] int64, as in ``gumbel_argmax``.
        params: one per row.

    Returns:
        [N] int64 token ids.
    """
    vocab_size = logits.shape[1]
    limits = _Limits.of(params, vocab_size, logits.device)
    largest_k = max((p.top_k for p in params if p.top_k < vocab_size), default=0)
    choices = torch.empty_like(seeds)
    rows = torch.arange(len(params), device=logits.device)
    for num_candidates in (max(_FEW, largest_k + _ROOM_FOR_TIES), _MANY, vocab_size):
        if len(rows):
            group = logits if len(rows) == len(params) else logits[rows]
            choices[rows], complete = _argmax_of_candidates(
                group, seeds[rows], positions[rows], limits[rows], min(num_candidates, vocab_size)
            )
            rows = rows[~complete]
    return choices


def _argmax_of_candidates(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, limits: _Limits, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices [N] among the largest logits, and [N] bool: whether these hold every kept token."""
    values, token_ids = logits.topk(num_candidates, dim=1)
    total = 1.0 / logits.softmax(dim=1).amax(dim=1).double()
    threshold = _threshold(values, total, limits, vocab_size=logits.shape[1])
    kept = values.masked_fill(values < threshold.unsqueeze(1), -torch.inf)
    complete = values[:, -1] < threshold  # strictly: equals may have been left out
    return gumbel_argmax(kept, seeds, positions, token_ids), complete


def _threshold(values: torch.Tensor, total: torch.Tensor, limits: _Limits, vocab_size: int) -> torch.Tensor:
    """The smallest logit kept in each row, [N] float32; -inf where the candidates cannot tell.

    Args:
        values: [N, K] float32, the largest logits in descending order.
        total: [N] float64, sum of exp(logit - largest logit) over the whole row.
        limits: the rows' top_k, top_p, min_p.
        vocab_size: a top_k of this size is off.
    """
    # Sums are in float64, so that neither K nor the order of summation moves a threshold.
    num_candidates = values.shape[1]
    last = limits.top_k.clamp(max=num_candidates) - 1
    kth = values.gather(1, last.unsqueeze(1)).squeeze(1)
    kth = torch.where(limits.top_k <= num_candidates, kth, -torch.inf)

    weights = (values - values[:, :1]).double().exp().masked_fill(values < kth.unsqueeze(1), 0.0)
    mass = weights.cumsum(dim=1)
    total = torch.where(limits.top_k < vocab_size, mass[:, -1], total)
    reached = mass >= (limits.top_p * total).unsqueeze(1)
    nucleus_end = values.gather(1, reached.int().argmax(dim=1, keepdim=True)).squeeze(1)
    nucleus_end = torch.where(reached[:, -1] & (limits.top_p < 1.0), nucleus_end, -torch.inf)
    return torch.maximum(torch.maximum(kth, nucleus_end), values[:, 0] + limits.log_min_p)
