"""What follows attention in a layer, in plain PyTorch: an MLP, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.models.config import Activation


@dataclass(frozen=True)
class Mlp:
    """A gated MLP. Gate and up share a matrix."""

    gate_up_proj: torch.Tensor
    """[2 * intermediate, hidden]"""
    down_proj: torch.Tensor
    """[hidden, intermediate]"""
    activation: Activation

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All weights."""
        return [self.gate_up_proj, self.down_proj]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, dim=-1)
        activated = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return F.linear(activated * up, self.down_proj)


@dataclass(frozen=True)
class MixtureOfExperts:
    """Many MLPs, of which each token goes through the few that its router scores highest (arXiv 1701.06538)."""

    router: torch.Tensor
    """[experts, hidden] float32"""
    experts: Sequence[Mlp]
    per_token: int
    normalized: bool
    """Whether the weights of a token's experts are made to sum to one"""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All weights."""
        return [self.router, *(tensor for expert in self.experts for tensor in expert.tensors)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        weights, chosen = F.linear(x.float(), self.router).softmax(dim=-1).topk(self.per_token)  # [T, per_token]
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x, dtype=torch.float32)
        for index in torch.unique(chosen).tolist():
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            out.index_add_(0, tokens, self.experts[index].forward(x[tokens]) * weights[tokens, places, None])
        return out.to(x.dtype)
