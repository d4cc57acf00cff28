"""Segments as a batch of chains, and what a draft says at each step of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from adapters.alignment.chain_walk import ChainWalk
from adapters.alignment.records import Segment, has_target
from adapters.alignment.text_prior import TextPrior, make_text_prior
from adapters.target_parts import TargetParts
from engine.models.eagle3 import Additions, Eagle3

_NO_LOGIT = -1e30
"""Stands at places without a token: a row of -inf has no softmax, and its gradient would spoil the whole batch's."""


@dataclass(frozen=True)
class ChainBatch:
    """B segments, padded on the right to T positions, and the N chains that start at their anchors, up to S steps long.

    Step s of the chain that starts at position t takes the token at t + s and is to give the one after it.
    """

    token_ids: torch.Tensor
    """[B, T + S] int64"""
    positions: torch.Tensor
    """[B, T] int64"""
    inputs: torch.Tensor
    """[B, T, width] bf16"""
    starts: torch.Tensor
    """[N] int64 ascending, index into B * T"""
    mask: torch.Tensor
    """[N, S] bool, steps for which the target's distribution is known; the first always"""
    top_ids: torch.Tensor
    """[N, S, k] int64"""
    top_logits: torch.Tensor
    """[N, S, k] float32"""
    refused: torch.Tensor
    """Some token ids, int64: drafted and refused"""
    prior: TextPrior | None = None
    """What is added to the draft's logits when it is served; None: nothing"""

    @cached_property
    def wanted_ids(self) -> torch.Tensor:
        """Ascending ids of all tokens that the target, the draft or the prior preferred somewhere, int64."""
        in_text = [] if self.prior is None else [self.token_ids.flatten()]  # the prior prefers what the text has had
        ids: torch.Tensor = torch.unique(torch.cat((self.top_ids.flatten(), self.refused, *in_text)))
        return ids

    def with_prior(
        self, logits: torch.Tensor, chains: torch.Tensor, step: int, token_ids: torch.Tensor
    ) -> torch.Tensor:
        """The draft's logits [n, R] for some tokens [R] at a step of some chains [n], and the prior's bonus."""
        if self.prior is None:
            return logits
        starts, length = self.starts[chains], self.positions.shape[1]
        return logits + self.prior.bonus(starts // length, starts % length, step, token_ids)


def collate(segments: Sequence[Segment], horizon: int) -> ChainBatch:
    """All chains of some segments, at least one."""
    length, k = max(len(s.positions) for s in segments), segments[0].top_ids.shape[1]
    size = (len(segments), length + horizon)
    token_ids = torch.zeros(size, dtype=torch.int64)
    positions = torch.full(size, -1)  # a position that follows no other
    inputs = torch.zeros(len(segments), length, segments[0].inputs.shape[1], dtype=torch.bfloat16)
    top_ids = torch.zeros(*size, k, dtype=torch.int64)
    top_logits = torch.full((*size, k), -torch.inf)
    anchors = torch.zeros(len(segments), length, dtype=torch.bool)
    for row, segment in enumerate(segments):
        n = len(segment.positions)
        token_ids[row, :n], positions[row, :n], inputs[row, :n] = segment.token_ids, segment.positions, segment.inputs
        top_ids[row, :n], top_logits[row, :n], anchors[row, :n] = segment.top_ids, segment.top_logits, segment.anchors
    rows, columns = anchors.nonzero(as_tuple=True)
    steps = torch.arange(horizon)
    places = rows[:, None], columns[:, None] + steps
    follows = positions[places] == positions[rows, columns][:, None] + steps
    refused = torch.cat([segment.refused for segment in segments]).long()
    return ChainBatch(
        token_ids=token_ids,
        positions=positions[:, :length].clamp(min=0),
        inputs=inputs,
        starts=rows * length + columns,
        mask=follows & has_target(top_logits.flatten(0, 1)).view(size)[places],
        top_ids=top_ids[places],
        top_logits=top_logits[places].nan_to_num(nan=_NO_LOGIT, posinf=_NO_LOGIT, neginf=_NO_LOGIT),
        refused=refused[refused >= 0],
        prior=make_text_prior(segments, size[1]),
    )


@dataclass(frozen=True)
class ChainStep:
    """One step of n of a batch's chains, those that were followed so far."""

    number: int
    """The step's number, from 0."""
    chains: torch.Tensor
    """[n] int64 ascending"""
    logits: torch.Tensor
    """[n, R] float32, the draft's for some tokens, and the prior's bonus on them"""
    columns: torch.Tensor
    """[n, k] int64, where among them the target's most likely ones are"""
    top_logits: torch.Tensor
    """[n, k] float32, the target's"""
    mask: torch.Tensor
    """[n] bool, whether the target's distribution is known"""


GoesOn = Callable[[ChainStep], torch.Tensor]
"""Which of the chains of a step are followed to the next, if there is one, [n] bool; called once for each step."""


def to_the_end(step: ChainStep) -> torch.Tensor:
    """``GoesOn`` that follows all chains."""
    return torch.ones_like(step.mask)


@dataclass(frozen=True)
class ChainDrafter:
    """A draft, alone or with an adapter, that drafts along the chains of a batch."""

    draft: Eagle3
    """float32, on the CPU"""
    target: TargetParts
    lora: Additions | None = None

    def steps(self, batch: ChainBatch, token_ids: torch.Tensor, goes_on: GoesOn = to_the_end) -> list[ChainStep]:
        """What the draft says at the steps of the chains, one after the other, differentiable in its weights.

        Args:
            batch: the chains.
            token_ids: [R] int64 ascending, all of ``batch.wanted_ids`` among them.
            goes_on: which chains are followed, and how far.
        """
        walk = self.walk(batch)
        rows, columns = self.target.head[token_ids].float(), torch.searchsorted(token_ids, batch.top_ids)
        steps: list[ChainStep] = []
        while True:
            chains, number = walk.chains, len(steps)
            of_target = (each[chains, number] for each in (columns, batch.top_logits, batch.mask))
            logits = batch.with_prior(walk.head_input @ rows.T, chains, number, token_ids)
            steps.append(ChainStep(number, chains, logits, *of_target))
            stays = goes_on(steps[-1])
            if len(steps) == batch.mask.shape[1] or not stays.any():
                return steps
            walk.advance(stays)

    def walk(self, batch: ChainBatch) -> ChainWalk:
        """The batch's chains, at their first step."""
        g = batch.inputs.float()
        if g.shape[-1] == self.draft.fc.in_features:
            g = self.draft.fuse(g)
        return ChainWalk(self.draft, self.target, self.lora, g, batch.token_ids, batch.positions, batch.starts)
