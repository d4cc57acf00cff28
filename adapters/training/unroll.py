"""A draft in training, every position unrolled over several steps: its loss, and how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from adapters.chain_walk import ChainWalk
from adapters.target_parts import TargetParts
from adapters.training.dataset import Batch
from adapters.training.head_loss import head_loss
from engine.models.eagle3 import Eagle3

_CHUNK = 512


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
