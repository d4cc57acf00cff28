"""The paper's curriculum loss (EvoSpec, arXiv 2605.27390, Eq. 4 and 5), as a function of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CurriculumLoss:
    """Σ_k w_k T² KL(target / T ‖ draft / T), with w_k = exp(−beta · L_base · (k − 1)) for steps k = 1, 2, ...

    L_base is the cross-entropy of the same chain's first step at temperature 1, taken as a constant. So exp(−L_base) is
    about the probability that the first draft is right, and a later step counts as much as it is likely to be reached;
    beta = 0 weighs all steps the same. (The paper leaves open whether L_base is a chain's or a batch's.)

    The target's distribution is over its top-k tokens, renormalised: what it gives to others is dropped. The draft's is
    over all columns of its logits, so what it gives to tokens outside the target's top-k counts as wrong, as far as
    there are columns for them.
    """

    beta: float = 0.3
    temperature: float = 1.0

    def __call__(
        self, draft_logits: torch.Tensor, columns: torch.Tensor, target_logits: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """The loss of N chains of S steps: mean over chains of the weighted sum over steps, a differentiable scalar.

        Args:
            draft_logits: [N, S, R], over R tokens that include the target's top-k.
            columns: [N, S, k] int64, the column of each of the target's top-k tokens.
            target_logits: [N, S, k], -inf for places that hold no token.
            mask: [N, S] bool, which steps there are; the first of every chain is.
        """
        base = _cross_entropy(draft_logits[:, :1], columns[:, :1], target_logits[:, :1], 1.0)[0][:, 0].detach()
        cross_entropy, entropy = _cross_entropy(draft_logits, columns, target_logits, self.temperature)
        divergence = torch.where(mask, cross_entropy - entropy, 0.0)
        steps = torch.arange(mask.shape[1], device=mask.device)
        weights = torch.exp(-self.beta * base[:, None] * steps)
        return self.temperature**2 * (weights * divergence).sum() / max(1, len(mask))


def _cross_entropy(
    draft_logits: torch.Tensor, columns: torch.Tensor, target_logits: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of target and draft, and the target's own entropy: [N, S] each."""
    logs = (target_logits / temperature).log_softmax(-1)
    shares = logs.exp()
    draft_logs = (draft_logits / temperature).log_softmax(-1).gather(-1, columns)
    is_token = shares > 0
    cross_entropy = -torch.where(is_token, shares * draft_logs, 0.0).sum(-1)
    entropy = -torch.where(is_token, shares * logs, 0.0).sum(-1)
    return cross_entropy, entropy
