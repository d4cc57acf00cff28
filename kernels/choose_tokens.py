"""One token a row: the largest logit, or a sample of what top-k, top-p and min-p keep."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kernels import native_sampling
from kernels.gumbel_argmax import gumbel_argmax, seeds_tensor, signed
from kernels.kept_thresholds import Limits, kept_thresholds

if TYPE_CHECKING:
    from kernels.native import Team


@dataclass(frozen=True)
class RowSampling:
    """How the tokens of rows are chosen, one entry a row; off are top_k 0, top_p 1 and min_p 0."""

    temperatures: Sequence[float]
    """0: greedy, whatever the limits"""
    seeds: Sequence[int]
    """Of any size; their lowest 64 bits count"""
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]

    @property
    def is_truncated(self) -> bool:
        """Whether any token may be cut off."""
        return max(self.top_k) > 0 or min(self.top_p) < 1.0 or max(self.min_p) > 0.0

    def arrays(self) -> dict[str, array[Any]]:
        """By name, as the compiled kernels take them."""
        return {
            "temperatures": array("f", self.temperatures),
            "seeds": array("q", [signed(seed, 64) for seed in self.seeds]),
            "top_k": array("i", self.top_k),
            "top_p": array("d", self.top_p),
            "min_p": array("d", self.min_p),
        }


def choose_tokens(
    logits: torch.Tensor,
    sampling: RowSampling | None,
    positions: Sequence[int],
    token_ids: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    team: Team | None = None,
) -> list[int]:
    """The token of every row: the largest logit where greedy, else a Gumbel argmax over what is not cut off.

    Args:
        logits: [N, V] float32, or [N, K] for a subset of tokens.
        sampling: of the rows; None: all greedy.
        positions: index of the chosen token in its sequence, one a row.
        token_ids: [N, K] int32, the tokens that the columns stand for (None: 0 .. V - 1).
        allowed: [N, ceil(V / 32)] int32, bits of the columns that may be chosen (None: all).
        team: threads of the compiled kernels (None: the calling one).

    Returns:
        the tokens, -1 for rows with a logit that is NaN or +inf: nothing is defined to be chosen there.
    """
    if native_sampling.can_take(logits):
        return native_sampling.choose_tokens(logits, sampling, positions, token_ids, allowed, team)
    if sampling is None and token_ids is None and allowed is None:
        chosen = logits.argmax(dim=1)
    else:
        chosen = _choose_by_tensors(logits, sampling, positions, token_ids, allowed)
    is_defined = (logits < torch.inf).all(dim=1)
    return torch.where(is_defined, chosen, -1).tolist()


def _choose_by_tensors(
    logits: torch.Tensor,
    sampling: RowSampling | None,
    positions: Sequence[int],
    token_ids: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    device = logits.device
    allowed = None if allowed is None else allowed.to(device)
    places = torch.tensor(positions, dtype=torch.int64, device=device)
    if sampling is None:
        seeds, temperatures = torch.zeros_like(places), torch.zeros(len(logits), device=device)
        return gumbel_argmax(logits, seeds, places, token_ids, temperatures=temperatures, allowed=allowed)
    temperatures = torch.tensor(sampling.temperatures, dtype=torch.float32, device=device)
    least = None
    if sampling.is_truncated:
        limits = Limits(
            torch.tensor(sampling.top_k, dtype=torch.int32, device=device),
            torch.tensor(sampling.top_p, dtype=torch.float64, device=device),
            torch.tensor(sampling.min_p, dtype=torch.float64, device=device),
        )
        least = kept_thresholds(logits, temperatures, limits, allowed)
    seeds = seeds_tensor(list(sampling.seeds), device)
    return gumbel_argmax(logits, seeds, places, token_ids, temperatures=temperatures, least=least, allowed=allowed)
