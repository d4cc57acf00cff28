"""The paper's curriculum loss (EvoSpec, arXiv 2605.27390, Eq. 4 and 5), as a function of logits.

    Σ_k w_k T² KL(target / T ‖ draft / T), with w_k = exp(−beta · L_base · (k − 1)) for steps k = 1, 2, ...

L_base is the cross-entropy of the same chain's first step at temperature 1, taken as a constant. So exp(−L_base) is
about the probability that the first draft is right, and a later step counts as much as it is likely to be reached; beta
= 0 weighs all steps the same. (The paper leaves open whether L_base is a chain's or a batch's.)

A step that weighs little costs as much to compute as any. So a chain is followed to step k with probability w_k, and
the steps that it has weigh 1: in expectation the same loss and the same gradient, for Σ_k w_k steps instead of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evospec.adapters.alignment.chains import ChainStep


class Curriculum:
    """``GoesOn`` for one batch: follows each chain to step k with probability w_k.

    Args:
        beta: how fast the weights fall.
        uniform: a number from [0, 1) for each chain.
    """

    def __init__(self, beta: float, uniform: torch.Tensor) -> None:
        self._beta, self._uniform = beta, uniform
        self._first_loss = torch.zeros_like(uniform)

    def __call__(self, step: ChainStep) -> torch.Tensor:
        if step.number == 0:
            self._first_loss = _cross_entropy(step, 1.0)[0].detach()
        weight_of_next = torch.exp(-self._beta * self._first_loss[step.chains] * (step.number + 1))
        return self._uniform[step.chains] < weight_of_next


def divergence(steps: Sequence[ChainStep], temperature: float = 1.0) -> torch.Tensor:
    """T² KL(target / T ‖ draft / T), mean over chains of the sum over their steps: a differentiable scalar.

    The target's distribution is over its top-k tokens, renormalised: what it gives to others is dropped. The draft's is
    over all columns of its logits, so what it gives to tokens outside the target's top-k counts as wrong, as far as
    there are columns for them.
    """
    total = torch.stack([step_divergence(step, temperature).sum() for step in steps]).sum()
    return total / max(1, len(steps[0].chains))


def step_divergence(step: ChainStep, temperature: float = 1.0) -> torch.Tensor:
    """T² KL(target / T ‖ draft / T) of each chain [n] in one step; 0 where it has none."""
    cross_entropy, entropy = _cross_entropy(step, temperature)
    return temperature**2 * torch.where(step.mask, cross_entropy - entropy, 0.0)


def _cross_entropy(step: ChainStep, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of target and draft, and the target's own entropy: [n] each."""
    logs = (step.top_logits / temperature).log_softmax(-1)
    shares = logs.exp()
    draft_logs = (step.logits / temperature).log_softmax(-1).gather(-1, step.columns)
    is_token = shares > 0
    cross_entropy = -torch.where(is_token, shares * draft_logs, 0.0).sum(-1)
    entropy = -torch.where(is_token, shares * logs, 0.0).sum(-1)
    return cross_entropy, entropy
