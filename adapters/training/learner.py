"""A draft in training and its optimiser: what is the same for one trained offline and one that grows from traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evospec.adapters.chain_walk import ChainWalk
from evospec.adapters.target_parts import TargetParts, with_others
from evospec.adapters.training.dataset import Batch
from evospec.adapters.training.head_loss import head_loss
from evospec.engine.models.eagle3 import Eagle3

_CHUNK = 512
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


@dataclass(frozen=True)
class Accuracy:
    """``steps[j]``: share of positions whose step j names the target's most likely token, the text before it given.

    ``acceptance_length``: mean tokens a verification with ``len(steps)`` drafts would give, the bonus token included.
    """

    steps: tuple[float, ...]
    acceptance_length: float


class Unroller:
    """Runs a draft over a batch.

    Args:
        draft: float32 master weights.
        target: its frozen parts.
    """

    def __init__(self, draft: Eagle3, target: TargetParts) -> None:
        self.draft, self.target = draft, target

    def precision(self) -> torch.autocast:
        """Products are made in the dtype of the target's head."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.target.head.dtype == torch.bfloat16)

    def walk(self, batch: Batch) -> ChainWalk:
        """The chains of a batch, at their first step."""
        return ChainWalk(self.draft, self.target, batch, self.draft.fuse(batch.features.to(self.target.head.dtype)))

    def loss(
        self, batch: Batch, rows: torch.Tensor, step_weights: tuple[float, ...]
    ) -> tuple[torch.Tensor, list[float]]:
        """Mean loss a chain, weighted over the steps; and each step's own mean.

        Only a random half of the windows goes on after the first step, which saves a third of the time and more: a
        token is the label of as many steps as there are, and what they teach is much the same (PARD, arXiv 2504.18583).
        """
        total = torch.zeros(())
        means = []
        goes_on = torch.randperm(len(batch.positions)) < -(-len(batch.positions) // 2)
        walk = self.walk(batch)
        for step, weight in enumerate(step_weights):
            if step:
                walk.advance(goes_on[walk.rows] & (batch.lengths[walk.chains] > step))
            label = self.target.head_input(batch.labels[walk.rows, walk.ends].to(rows.dtype))
            loss = head_loss(walk.head_input.to(rows.dtype), label, rows) / max(1, len(label))
            total = total + weight / sum(step_weights) * loss
            means.append(float(loss.detach()))
        return total, means

    @torch.inference_mode()
    def accuracy(self, batches: Sequence[Batch], num_steps: int) -> Accuracy:
        """Over the full head, teacher-forced: a chain's later tokens are the text's own."""
        hits, counts = [0] * num_steps, [0] * num_steps
        accepted, chains = 0, 0
        with self.precision():
            for batch in batches:
                labels = batch.labels.flatten(0, 1).to(self.target.head.dtype)
                right = self._most_likely(self.target.head_input(labels)).view(batch.labels.shape[:2])
                walk, alive = self.walk(batch), batch.lengths >= num_steps
                chains += int(alive.sum())
                for step in range(num_steps):
                    if step:
                        walk.advance(batch.lengths[walk.chains] > step)
                    hit = self._most_likely(walk.head_input) == right[walk.rows, walk.ends]
                    hits[step] += int(hit.sum())
                    counts[step] += len(hit)
                    alive[walk.chains] &= hit
                    accepted += int(alive.sum())
        steps = tuple(hit / max(1, count) for hit, count in zip(hits, counts, strict=True))
        return Accuracy(steps, 1 + accepted / max(1, chains))

    def _most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.target.head
        return torch.cat([F.linear(chunk.to(head.dtype), head).argmax(-1) for chunk in torch.split(hidden, _CHUNK)])


class Learner(Unroller):
    """AdamW on all weights of the draft."""

    def __init__(self, draft: Eagle3, target: TargetParts) -> None:
        super().__init__(draft, target)
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
        # None of the batch's own tokens is left out: where a label's token has no row, the rest of the label is noise.
        wanted = torch.unique(torch.cat((batch.token_ids.flatten(), core)))
        drawn = torch.randint(0, len(self.target.head), (_RANDOM_ROWS,))
        rows = self.target.head[with_others(wanted, drawn, _TILE)]
        with self.precision():
            loss, means = self.loss(batch, rows, tuple(_STEP_DISCOUNT**step for step in range(num_steps)))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), _CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self._rate_share * min(1.0, (number + 1) / _WARMUP_STEPS)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return means


def most_frequent(counts: torch.Tensor) -> torch.Tensor:
    """The tokens that are in every loss, given how often each was seen [vocab]."""
    return counts.argsort(descending=True)[:_CORE_ROWS]
