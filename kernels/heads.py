"""Queries, keys and values as a product has them, and what is done to them before attention."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Heads(NamedTuple):
    """How a product [T, (queries + 2 * keys) * dim] holds queries, then keys, then as many values."""

    queries: int
    keys: int
    dim: int

    def split(self, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., queries, dim], and twice [..., keys, dim]."""
        heads = product.view(*product.shape[:-1], -1, self.dim)
        q, k, v = heads.split_with_sizes([self.queries, self.keys, self.keys], dim=-2)
        return q, k, v


class HeadNorms(NamedTuple):
    """Root-mean-square norms of heads before their rotary embedding; weights [dim]."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class Rotation(NamedTuple):
    """Angles of a rotary embedding, and the positions [T] of the tokens that turn by them."""

    cos_sin: torch.Tensor
    """[positions, rotary] float32: cosines, then sines; of a head's first ``rotary`` numbers, whose halves are pairs"""
    positions: torch.Tensor
