"""Segments as a batch of chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from adapters.alignment.records import Segment, has_target
from adapters.alignment.text_prior import TextPrior, make_text_prior
from adapters.chain_walk import ChainBatch

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

    def with_prior(
        self, logits: torch.Tensor, chains: torch.Tensor, step: int, token_ids: torch.Tensor
    ) -> torch.Tensor:
        """The draft's logits [n, R] for some tokens [R] at a step of some chains [n], and the prior's bonus."""
        if self.prior is None:
            return logits
        starts = self.starts[chains]
        return logits + self.prior.bonus(starts // self.length, starts % self.length, step, token_ids)


def collate(segments: Sequence[Segment], horizon: int) -> SegmentBatch:
    """All chains of some segments, at least one."""
    token_ids = _padded([segment.token_ids for segment in segments], horizon)
    positions = _padded([segment.positions for segment in segments], horizon, -1)  # one that follows no other
    top_ids = _padded([segment.top_ids for segment in segments], horizon).long()
    top_logits = _padded([segment.top_logits.float() for segment in segments], horizon, -torch.inf)
    rows, columns = _padded([segment.anchors for segment in segments], 0).nonzero(as_tuple=True)
    length, steps = positions.shape[1] - horizon, torch.arange(horizon)
    places = rows[:, None], columns[:, None] + steps
    follows = positions[places] == positions[rows, columns][:, None] + steps
    refused = torch.cat([segment.refused for segment in segments]).long()
    return SegmentBatch(
        token_ids=token_ids,
        positions=positions[:, :length].clamp(min=0),
        inputs=_padded([segment.inputs for segment in segments], 0),
        starts=rows * length + columns,
        mask=follows & has_target(top_logits)[places],
        top_ids=top_ids[places],
        top_logits=top_logits[places].nan_to_num(nan=_NO_LOGIT, posinf=_NO_LOGIT, neginf=_NO_LOGIT),
        refused=refused[refused >= 0],
        prior=make_text_prior(segments, length + horizon),
    )


def _padded(rows: list[torch.Tensor], more: int, value: float = 0) -> torch.Tensor:
    """Tensors [n, ...] of each segment, padded and stacked to [B, T + more, ...]."""
    batch = pad_sequence(rows, batch_first=True, padding_value=value)
    return F.pad(batch, (0, 0) * (batch.dim() - 2) + (0, more), value=value)
