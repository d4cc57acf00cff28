"""How good weights are on segments that they were not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters.chains import ChainBatch, Chains, collate
from adapters.curriculum_loss import CurriculumLoss
from adapters.records import Segment

_RANDOM_ROWS = 2048
_BATCH = 16
"""Segments at a time, which bounds the memory of their logits."""
_SEED = 20_260_527


@dataclass(frozen=True)
class Score:
    """Mean over chains.

    ``agreement``: tokens of a chain that name the target's most likely one before the first that does not, the text
    before each given; what a verification would accept. ``loss``: KL of all steps, each the same weight. (With the
    curriculum's weights a draft that gets worse at the first step would look better, since its later ones would count
    less.)
    """

    agreement: float
    loss: float
    accepted: torch.Tensor
    """[chains] float32, of which ``agreement`` is the mean"""
    requests: torch.Tensor
    """[chains] int64, which request each chain is of; chains of one request are alike."""


@torch.no_grad()
def score(
    chains: Chains,
    segments: Sequence[Segment],
    weights: Sequence[Mapping[str, torch.Tensor]],
    horizon: int,
) -> list[Score]:
    """A score for each set of weights, on the same chains.

    The draft chooses among all tokens that target or draft ever preferred in these segments and a fixed sample of the
    others, not the whole vocabulary: a head of 150,000 rows would cost as much as an update.
    """
    batches = [collate(segments[at : at + _BATCH], horizon) for at in range(0, len(segments), _BATCH)]
    vocab = len(chains.target.head)
    sample = torch.randint(0, vocab, (_RANDOM_ROWS,), generator=torch.Generator().manual_seed(_SEED))
    token_ids = torch.unique(torch.cat([*(batch.wanted_ids for batch in batches), sample]))
    requests = _requests(segments)
    return [_score(chains, batches, each, token_ids, requests) for each in weights]


def _score(
    chains: Chains,
    batches: Sequence[ChainBatch],
    weights: Mapping[str, torch.Tensor],
    token_ids: torch.Tensor,
    requests: torch.Tensor,
) -> Score:
    accepted, total, loss = [], 0.0, CurriculumLoss(beta=0.0)
    for batch in batches:
        logits, columns = chains.logits(batch, weights, token_ids)
        hits = (logits.argmax(-1) == columns[..., 0]) & batch.mask
        accepted.append(hits.float().cumprod(-1).sum(-1))
        total += float(loss(logits, columns, batch.top_logits, batch.mask)) * len(batch.starts)
    of_all = torch.cat(accepted)
    return Score(float(of_all.mean()), total / len(of_all), of_all, requests)


def _requests(segments: Sequence[Segment]) -> torch.Tensor:
    """Of each chain, in the order of ``collate``, a number of the request that it is of."""
    numbers: dict[str, int] = {}
    of_segment = [numbers.setdefault(segment.request_id, len(numbers)) for segment in segments]
    counts = [segment.num_anchors for segment in segments]
    return torch.tensor(of_segment).repeat_interleave(torch.tensor(counts))
