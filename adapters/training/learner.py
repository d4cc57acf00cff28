"""A draft in training and its optimiser: what is the same for one trained offline and one that grows from traffic."""

from __future__ import annotations

import torch

from adapters.target_parts import TargetParts, with_others
from adapters.training.dataset import Batch
from adapters.training.unroll import Unroller
from engine.models.eagle3 import Eagle3

_CORE_ROWS, _RANDOM_ROWS = 2048, 2048
"""Rows of the head in every loss, of the most frequent tokens, and those drawn anew for each batch."""
_TILE = 32
"""Rows of a product that the fastest kernels take at once."""
_STEP_DISCOUNT = 0.9
"""Weight of an unrolled step's loss against that of the step before, as in EAGLE-3's code."""
_WARMUP_STEPS = 40
_CLIP, _WEIGHT_DECAY = 1.0, 0.01
_RATE_WIDTH = 576
"""Width of the draft that learning rates are given for: the wider another is, the smaller its own."""


class Learner:
    """AdamW on all weights of a draft.

    Args:
        draft: float32 master weights.
        target: its frozen parts.
    """

    def __init__(self, draft: Eagle3, target: TargetParts) -> None:
        self.unroller = Unroller(draft, target)
        self._rate_share = _RATE_WIDTH / draft.config.hidden_size
        self.optimizer = torch.optim.AdamW(
            draft.parameters(), betas=(0.9, 0.95), weight_decay=_WEIGHT_DECAY, fused=True
        )

    def step(self, batch: Batch, core: torch.Tensor, num_steps: int, rate: float, number: int) -> list[float]:
        """One step of the optimiser on all chains of a batch, each unrolled over ``num_steps`` steps.

        Args:
            core: ids of frequent tokens, as ``most_frequent`` gives them.
            num_steps: 1: the cheap first phase of training.
            rate: learning rate after the warm-up, of a draft 576 wide; another's is in inverse proportion to its width.
            number: of this step, from 0.

        Returns:
            The mean loss of each unrolled step.
        """
        draft, target = self.unroller.draft, self.unroller.target
        drawn = torch.randint(0, len(target.head), (_RANDOM_ROWS,))
        rows = target.head[rows_of_loss(batch, core, drawn)]
        with self.unroller.precision():
            loss, means = self.unroller.loss(batch, rows, tuple(_STEP_DISCOUNT**step for step in range(num_steps)))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(draft.parameters(), _CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self._rate_share * min(1.0, (number + 1) / _WARMUP_STEPS)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return means


def most_frequent(counts: torch.Tensor) -> torch.Tensor:
    """The tokens that are in every loss, given how often each was seen [vocab]."""
    return counts.argsort(descending=True)[:_CORE_ROWS]


def rows_of_loss(batch: Batch, core: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Token ids whose rows of the head a loss is over: the batch's own, ``core``, so many of ``drawn`` as fill tiles.

    Of the others none is left out: where a label's token has no row, the rest of the label is noise.
    """
    return with_others(torch.unique(torch.cat((batch.token_ids.flatten(), core))), drawn, _TILE)
