"""The paper's curriculum loss (EvoSpec, arXiv 2605.27390, Eq. 4 and 5), as a function of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters.chains import ChainSteps


@dataclass(frozen=True)
class CurriculumLoss:
    """Σ_k w_k T² KL(target / T ‖ draft / T), with w_k = exp(−beta · L_base · (k − 1)) for steps k = 1, 2, ...

    L_base is the cross-entropy of the same chain's first step at temperature 1, taken as a constant. So exp(−L_base) is
    about the probability that the first draft is right, and a later step counts as much as it is likely to be reached;
    beta = 0 weighs all steps the same. (The paper leaves open whether L_base is a chain's or a batch's.)

    A step that weighs little costs as much to compute as any. So a chain is followed to step k with probability w_k,
    and the steps that it has weigh 1: the same loss and gradient in expectation, for Σ_k w_k steps instead of all.

    The target's distribution is over its top-k tokens, renormalised: what it gives to others is dropped. The draft's is
    over all columns of its logits, so what it gives to tokens outside the target's top-k counts as wrong, as far as
    there are columns for them.
    """

    beta: float = 0.3
    temperature: float = 1.0

    def lengths(self, first: ChainSteps, uniform: torch.Tensor, most: int) -> torch.Tensor:
        """How many steps each of N chains is followed, int64 from 1 to ``most``: to step k with probability w_k.

        Args:
            first: the chains' first steps.
            uniform: [N], drawn from [0, 1).
        """
        base = _cross_entropy(first, 1.0)[0]
        further = -torch.log1p(-uniform) / (self.beta * base)  # exponential: at least k - 1 with probability w_k
        return 1 + further.nan_to_num(nan=most).clamp(max=most - 1).long()

    def __call__(self, steps: ChainSteps, num_chains: int) -> torch.Tensor:
        """Mean over chains of the sum over the steps that they have, a scalar differentiable in the draft's logits."""
        return self.of_steps(steps).sum() / max(1, num_chains)

    def of_steps(self, steps: ChainSteps) -> torch.Tensor:
        """T² KL(target / T ‖ draft / T) of each of M steps, [M]; zero where the target's distribution is not known."""
        cross_entropy, entropy = _cross_entropy(steps, self.temperature)
        return torch.where(steps.mask, self.temperature**2 * (cross_entropy - entropy), 0.0)


def _cross_entropy(steps: ChainSteps, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of target and draft, and the target's own entropy: [M] each."""
    logs = (steps.top_logits / temperature).log_softmax(-1)
    shares = logs.exp()
    draft_logs = (steps.logits / temperature).log_softmax(-1).gather(-1, steps.columns)
    is_token = shares > 0
    cross_entropy = -torch.where(is_token, shares * draft_logs, 0.0).sum(-1)
    entropy = -torch.where(is_token, shares * logs, 0.0).sum(-1)
    return cross_entropy, entropy
