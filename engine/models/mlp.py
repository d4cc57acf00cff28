"""What follows attention in a layer, in plain PyTorch: an MLP, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evospec.engine.models.config import Activation
from evospec.engine.models.projection import Projection
from evospec.kernels.between_products import gated


@dataclass(frozen=True)
class Mlp:
    """A gated MLP. Gate and up share a matrix."""

    gate_up_proj: Projection
    """[2 * intermediate, hidden]"""
    down_proj: Projection
    """[hidden, intermediate]"""
    activation: Activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down_proj(gated(self.gate_up_proj(x), self.activation))


@dataclass(frozen=True)
class MixtureOfExperts:
    """Many MLPs, of which each token goes through the few that its router scores highest (arXiv 1701.06538)."""

    router: torch.Tensor
    """[experts, hidden] float32"""
    experts: Sequence[Mlp]
    per_token: int
    normalized: bool
    """Whether the weights of a token's experts are made to sum to one"""
    router_bias: torch.Tensor | None = None
    """[experts] float32"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        scores = F.linear(x.float(), self.router, self.router_bias)
        weights, chosen = scores.softmax(dim=-1).topk(self.per_token)  # [T, per_token]
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x, dtype=torch.float32)
        of_choices, choices = chosen.flatten().sort(stable=True)
        tokens, weights = choices // self.per_token, weights.flatten()[choices, None]
        numbers = torch.arange(len(self.experts) + 1, device=x.device)
        bounds = torch.searchsorted(of_choices, numbers).tolist()  # a GPU's host waits here, once
        for expert, start, end in zip(self.experts, bounds[:-1], bounds[1:], strict=True):
            if start < end:
                mine = tokens[start:end]
                out.index_add_(0, mine, expert.forward(x[mine]) * weights[start:end])
        return out.to(x.dtype)
