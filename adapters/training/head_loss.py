"""What training a draft makes smaller, over some rows of the target's head, with the gradient made on the way.

A draft token is accepted with the overlap of draft's and target's distribution, sum min(q, p). A small draft cannot
have all of the target's distribution, and the cross-entropy alone would spend it on tokens that are never chosen. So
the loss is LK-lambda (arXiv 2602.23881): ``share`` of the cross-entropy and the rest of 1 - overlap, where the share is
exp(-3 overlap): what is far from the target learns its distribution first, what is near learns to be accepted.

Neither logits nor probabilities of a batch are ever held: a chunk of the batch at a time stays in cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_CHUNK = 256
_DECAY = 3.0
"""How fast the cross-entropy's share falls with a chunk's mean overlap; the paper's."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            wanted = F.linear(target[chunk], rows).float().softmax(-1)
            logs = F.linear(hidden[chunk], rows).float().log_softmax(-1)
            cross_entropy = -torch.dot(wanted.flatten(), logs.flatten())
            drafted = logs.exp_()
            overlap = torch.minimum(drafted, wanted).sum(-1)
            share = torch.exp(-_DECAY * overlap.mean())
            loss += torch.lerp((1 - overlap).sum(), cross_entropy, share)
            # Of 1 - overlap only tokens that the draft gives too little have a part that grows with their logit.
            below = torch.where(drafted < wanted, drafted, 0.0)
            missed = drafted * below.sum(-1, keepdim=True) - below
            difference = torch.lerp(missed, drafted - wanted, share)
            torch.mm(difference.to(rows.dtype), rows, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def head_loss(hidden: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum of the positions' losses, float32 scalar. The share of each is taken as given, it has no gradient.

    Args:
        hidden: [N, d] draft's head input, dtype of ``rows``.
        target: [N, d] target's head input at the same positions, the soft label.
        rows: [V, d] rows of the target's head, frozen.
    """
    loss: torch.Tensor = _HeadLoss.apply(hidden, target, rows)  # type: ignore[no-untyped-call]
    return loss
