"""How good weights are on segments that they were not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters.chains import ChainBatch, Chains, collate
from adapters.curriculum_loss import CurriculumLoss
from adapters.records import Segment

_RANDOM_ROWS = 2048
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
    batch = collate(segments, horizon)
    vocab = len(chains.target.head)
    sample = torch.randint(0, vocab, (_RANDOM_ROWS,), generator=torch.Generator().manual_seed(_SEED))
    token_ids = torch.unique(torch.cat((batch.wanted_ids, sample)))
    requests = _requests(segments, batch)
    scores, loss = [], CurriculumLoss(beta=0.0)
    for each in weights:
        logits, columns = chains.logits(batch, each, token_ids)
        hits = (logits.argmax(-1) == columns[..., 0]) & batch.mask
        accepted = hits.float().cumprod(-1).sum(-1)
        total = loss(logits, columns, batch.top_logits, batch.mask).total
        scores.append(Score(float(accepted.mean()), float(total), accepted, requests))
    return scores


def _requests(segments: Sequence[Segment], batch: ChainBatch) -> torch.Tensor:
    """Of each chain of a batch, a number of the request that it is of."""
    numbers: dict[str, int] = {}
    of_segment = [numbers.setdefault(segment.request_id, len(numbers)) for segment in segments]
    return torch.tensor(of_segment)[batch.starts // batch.inputs.shape[1]]
