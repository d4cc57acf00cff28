"""Segments as a batch of chains, and what draft and target say along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from evospec.adapters.alignment.records import Segment, has_target
from evospec.adapters.alignment.text_prior import TextPrior, make_text_prior
from evospec.adapters.chain_walk import ChainBatch, ChainWalk
from evospec.adapters.target_parts import TargetParts
from evospec.engine.models.eagle3 import Additions, Eagle3

_PLACES = 64
"""Segments are padded to multiples of it, for the same reason as rows (``chain_walk``)."""
_NO_LOGIT = -1e30
"""Stands at places without a token: a row of -inf has no softmax, and its gradient would spoil the whole batch's."""


@dataclass(frozen=True)
class SegmentBatch(ChainBatch):
    """The chains that start at the anchors of B segments, up to S steps long."""

    inputs: torch.Tensor  # [B, T, width] bf16
    mask: torch.Tensor  # [N, S] bool, steps for which the target's distribution is known; the first always
    top_ids: torch.Tensor  # [N, S, k] int64
    top_logits: torch.Tensor  # [N, S, k] float32
    refused: torch.Tensor  # int64, ids of tokens that were drafted and refused
    prior: TextPrior | None = None  # what is added to the draft's logits when it is served; None: nothing

    @cached_property
    def wanted_ids(self) -> torch.Tensor:
        """Ascending ids of all tokens that the target, the draft or the prior preferred somewhere, int64."""
        in_text = [] if self.prior is None else [self.token_ids.flatten()]  # the prior prefers what the text has had
        ids: torch.Tensor = torch.unique(torch.cat((self.top_ids.flatten(), self.refused, *in_text)))
        return ids


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

    draft: Eagle3  # on the CPU
    target: TargetParts
    lora: Additions | None = None

    def precision(self) -> torch.autocast:
        """Products are made in bf16 where that is the dtype of the draft's weights, and everything else in float32."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.draft.fc.weight.dtype == torch.bfloat16)

    def walk(self, batch: SegmentBatch) -> ChainWalk:
        """The chains of a batch, at their first step."""
        g, fusion = batch.inputs.float(), self.draft.fc
        if g.shape[-1] != fusion.out_features:
            g = self.draft.fuse(g[..., : fusion.in_features])
        return ChainWalk(self.draft, self.target, batch, g, self.lora)

    def steps(self, batch: SegmentBatch, token_ids: torch.Tensor, goes_on: GoesOn | None = None) -> list[ChainStep]:
        """What the draft says at the steps of the chains, one after the other, differentiable in its weights.

        Args:
            batch: the chains.
            token_ids: [R] int64 ascending, all of ``batch.wanted_ids`` among them.
            goes_on: which chains are followed, and how far; None: all to the end.
        """
        with self.precision():
            return self._steps(batch, token_ids, goes_on)

    def _steps(self, batch: SegmentBatch, token_ids: torch.Tensor, goes_on: GoesOn | None) -> list[ChainStep]:
        walk = self.walk(batch)
        rows, columns = self.target.head[token_ids], torch.searchsorted(token_ids, batch.top_ids)
        if not torch.is_autocast_enabled("cpu"):
            rows = rows.float()
        steps: list[ChainStep] = []
        while True:
            chains, number = walk.chains, len(steps)
            of_target = (each[chains, number] for each in (columns, batch.top_logits, batch.mask))
            logits = walk.logits(rows)
            if batch.prior is not None:
                logits = logits + batch.prior.bonus(walk.rows, walk.ends - number, number, token_ids)
            steps.append(ChainStep(number, chains, logits, *of_target))
            stays = torch.ones_like(steps[-1].mask) if goes_on is None else goes_on(steps[-1])
            if len(steps) == batch.mask.shape[1] or not stays.any():
                return steps
            walk.advance(stays)


def collate(segments: Sequence[Segment], horizon: int) -> SegmentBatch:
    """All chains of some segments, at least one."""
    token_ids = padded([segment.token_ids for segment in segments], horizon)
    positions = padded([segment.positions for segment in segments], horizon, -1)  # one that follows no other
    top_ids = padded([segment.top_ids for segment in segments], horizon).long()
    top_logits = padded([segment.top_logits.float() for segment in segments], horizon, -torch.inf)
    rows, columns = padded([segment.anchors for segment in segments], 0).nonzero(as_tuple=True)
    length, steps = positions.shape[1] - horizon, torch.arange(horizon)
    places = rows[:, None], columns[:, None] + steps
    follows = positions[places] == positions[rows, columns][:, None] + steps
    refused = torch.cat([segment.refused for segment in segments]).long()
    return SegmentBatch(
        token_ids=token_ids,
        positions=positions[:, :length].clamp(min=0),
        inputs=padded([segment.inputs for segment in segments], 0),
        starts=rows * length + columns,
        mask=follows & has_target(top_logits)[places],
        top_ids=top_ids[places],
        top_logits=top_logits[places].nan_to_num(nan=_NO_LOGIT, posinf=_NO_LOGIT, neginf=_NO_LOGIT),
        refused=refused[refused >= 0],
        prior=make_text_prior(segments, length + horizon),
    )


def padded(rows: list[torch.Tensor], more: int, value: float = 0) -> torch.Tensor:
    """Tensors [n, ...] of each segment, padded and stacked to [B, T + more, ...]."""
    batch = pad_sequence(rows, batch_first=True, padding_value=value)
    more += -batch.shape[1] % _PLACES
    return F.pad(batch, (0, 0) * (batch.dim() - 2) + (0, more), value=value)
