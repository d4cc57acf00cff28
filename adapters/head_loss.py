"""Cross-entropy against the target's own distribution, over some rows of its head, with the gradient made on the way.

Neither logits nor probabilities of a batch are ever held: a piece of the batch at a time stays in cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_PIECE = 256


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _PIECE):
            piece = slice(start, start + _PIECE)
            wanted = F.linear(target[piece], rows).float().softmax(-1)
            logs = F.linear(hidden[piece], rows).float().log_softmax(-1)
            loss -= torch.dot(wanted.flatten(), logs.flatten())
            difference = logs.exp_().sub_(wanted)
            torch.mm(difference.to(rows.dtype), rows, out=gradient[piece])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def head_loss(hidden: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies, float32 scalar.

    Args:
        hidden: [N, d] draft's head input, dtype of ``rows``.
        target: [N, d] target's head input at the same positions, the soft label.
        rows: [V, d] rows of the target's head, frozen.
    """
    loss: torch.Tensor = _HeadLoss.apply(hidden, target, rows)  # type: ignore[no-untyped-call]
    return loss
