"""What a draft says along the chains of a batch, beside what the target says there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters.alignment.chains import SegmentBatch
from adapters.chain_walk import ChainWalk
from adapters.target_parts import TargetParts
from engine.models.eagle3 import Additions, Eagle3


@dataclass(frozen=True)
class ChainStep:
    """One step of n of a batch's chains, those that were followed so far."""

    number: int  # the step's number, from 0
    chains: torch.Tensor  # [n] int64 ascending
    logits: torch.Tensor  # [n, R] float32, the draft's for some tokens, and the prior's bonus on them
    columns: torch.Tensor  # [n, k] int64, where among them the target's most likely ones are
    top_logits: torch.Tensor  # [n, k] float32, the target's
    mask: torch.Tensor  # [n] bool, whether the target's distribution is known


GoesOn = Callable[[ChainStep], torch.Tensor]
"""Which of the chains of a step are followed to the next, if there is one, [n] bool; called once for each step."""


@dataclass(frozen=True)
class ChainDrafter:
    """A draft, alone or with an adapter, that drafts along the chains of a batch."""

    draft: Eagle3  # float32, on the CPU
    target: TargetParts
    lora: Additions | None = None

    def walk(self, batch: SegmentBatch) -> ChainWalk:
        """The chains of a batch, at their first step."""
        g = batch.inputs.float()
        if g.shape[-1] == self.draft.fc.in_features:
            g = self.draft.fuse(g)
        return ChainWalk(self.draft, self.target, batch, g, self.lora)

    def steps(self, batch: SegmentBatch, token_ids: torch.Tensor, goes_on: GoesOn | None = None) -> list[ChainStep]:
        """What the draft says at the steps of the chains, one after the other, differentiable in its weights.

        Args:
            batch: the chains.
            token_ids: [R] int64 ascending, all of ``batch.wanted_ids`` among them.
            goes_on: which chains are followed, and how far; None: all to the end.
        """
        walk = self.walk(batch)
        rows, columns = self.target.head[token_ids].float(), torch.searchsorted(token_ids, batch.top_ids)
        steps: list[ChainStep] = []
        while True:
            chains, number = walk.chains, len(steps)
            of_target = (each[chains, number] for each in (columns, batch.top_logits, batch.mask))
            logits = batch.with_prior(walk.head_input @ rows.T, chains, number, token_ids)
            steps.append(ChainStep(number, chains, logits, *of_target))
            stays = torch.ones_like(steps[-1].mask) if goes_on is None else goes_on(steps[-1])
            if len(steps) == batch.mask.shape[1] or not stays.any():
                return steps
            walk.advance(stays)
