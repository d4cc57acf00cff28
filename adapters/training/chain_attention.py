"""Attention of training-time test: every position is the start of an unrolled draft (EAGLE-3, arXiv 2503.01840).

Position t stands for a chain that starts with the committed token t. Its step j computes the token at t + j; it sees
the first step's keys of all positions up to t (committed tokens) and its own keys of steps 1 .. j (drafted ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _ChainAttention(torch.autograd.Function):
    """Flash attention over the first step's keys, merged with one key a position for each later step.

    The merged output and log-sum-exp are all that the flash kernel's backward pass needs to know of the other keys.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *chain: torch.Tensor
    ) -> torch.Tensor:
        out, lse = _flash(q, keys, values, 0.0, True)
        if chain:
            scale = q.shape[-1] ** -0.5
            later_keys, later_values = chain[: len(chain) // 2], chain[len(chain) // 2 :]
            scores = torch.stack([(q * key).sum(-1, dtype=torch.float32) * scale for key in later_keys], dim=-1)
            total = torch.logsumexp(torch.cat((lse.float().unsqueeze(-1), scores), dim=-1), dim=-1)
            merged = out * (lse - total).exp().unsqueeze(-1)
            weights = (scores - total.unsqueeze(-1)).exp()
            for index, value in enumerate(later_values):
                merged = merged + weights[..., index, None] * value
            out, lse = merged.to(q.dtype), total
        ctx.save_for_backward(q, keys, values, out, lse, *chain)
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, keys, values, out, lse, *chain = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q, grad_keys, grad_values = _flash_backward(grad, q, keys, values, out, lse, 0.0, True)
        if not chain:
            return grad_q, grad_keys, grad_values
        scale = q.shape[-1] ** -0.5
        later_keys, later_values = chain[: len(chain) // 2], chain[len(chain) // 2 :]
        grad_dot_out = (grad * out).sum(-1, dtype=torch.float32)
        grad_later_keys, grad_later_values = [], []
        for key, value in zip(later_keys, later_values, strict=True):
            score = (q * key).sum(-1, dtype=torch.float32) * scale
            weight = (score - lse).exp()
            grad_score = weight * ((grad * value).sum(-1, dtype=torch.float32) - grad_dot_out) * scale
            grad_score = grad_score.unsqueeze(-1).to(q.dtype)
            grad_q = grad_q + grad_score * key
            grad_later_keys.append(grad_score * q)
            grad_later_values.append(weight.unsqueeze(-1).to(q.dtype) * grad)
        return grad_q, grad_keys, grad_values, *grad_later_keys, *grad_later_values


def chain_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    later_keys: Sequence[torch.Tensor],
    later_values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """One step's attention: [B, heads, T, head_dim] of queries, and of the first step's keys and values.

    Args:
        q: queries of step j, rotary applied at t + j.
        keys, values: of step 0.
        later_keys, later_values: of steps 1 .. j, seen by their own position only.
    """
    result: torch.Tensor = _ChainAttention.apply(q, keys, values, *later_keys, *later_values)  # type: ignore[no-untyped-call]
    return result
