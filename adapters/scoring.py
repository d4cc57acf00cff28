"""How good weights are on segments that they were not trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters.chains import Chains, collate
from adapters.curriculum_loss import CurriculumLoss
from adapters.records import Segment

_RANDOM_ROWS = 2048
_BATCH = 4
"""Segments at a time, which bounds the memory of their logits, and how long the worker is away."""
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


class Scoring:
    """A score for each set of weights, on the same chains, some segments at a time: it takes longer than many updates.

    The draft chooses among all tokens that target or draft ever preferred in these segments and a fixed sample of the
    others, not the whole vocabulary: a head of 150,000 rows would cost as much as an update.

    Args:
        chains: of the base draft.
        segments: at least one.
        weights: to be compared, by name, in place of the base draft's.
        horizon: steps of a chain.
    """

    def __init__(
        self,
        chains: Chains,
        segments: Sequence[Segment],
        weights: Sequence[Mapping[str, torch.Tensor]],
        horizon: int,
    ) -> None:
        self._chains, self._weights = chains, weights
        self._batches = [collate(segments[at : at + _BATCH], horizon) for at in range(0, len(segments), _BATCH)]
        vocab = len(chains.target.head)
        sample = torch.randint(0, vocab, (_RANDOM_ROWS,), generator=torch.Generator().manual_seed(_SEED))
        self._token_ids = torch.unique(torch.cat([*(batch.wanted_ids for batch in self._batches), sample]))
        self._requests = _requests(segments)
        self._accepted: list[list[torch.Tensor]] = [[] for _ in weights]
        self._loss = [0.0 for _ in weights]
        self._num_done = 0
        self.seconds = 0.0
        """What it took so far, of this process."""

    @property
    def is_done(self) -> bool:
        """Whether there are ``scores``."""
        return self._num_done == len(self._batches)

    @torch.no_grad()
    def go_on(self) -> None:
        """Score the next few segments."""
        started = time.process_time()
        batch, loss = self._batches[self._num_done], CurriculumLoss(beta=0.0)
        self._num_done += 1
        for number, weights in enumerate(self._weights):
            logits, columns = self._chains.logits(batch, weights, self._token_ids)
            hits = (logits.argmax(-1) == columns[..., 0]) & batch.mask
            self._accepted[number].append(hits.float().cumprod(-1).sum(-1))
            self._loss[number] += float(loss(logits, columns, batch.top_logits, batch.mask)) * len(batch.starts)
        self.seconds += time.process_time() - started

    def scores(self) -> list[Score]:
        """One for each set of weights."""
        of_all = [torch.cat(accepted) for accepted in self._accepted]
        return [
            Score(float(accepted.mean()), loss / len(accepted), accepted, self._requests)
            for accepted, loss in zip(of_all, self._loss, strict=True)
        ]


def _requests(segments: Sequence[Segment]) -> torch.Tensor:
    """Of each chain, in the order of ``collate``, a number of the request that it is of."""
    numbers: dict[str, int] = {}
    of_segment = [numbers.setdefault(segment.request_id, len(numbers)) for segment in segments]
    counts = [segment.num_anchors for segment in segments]
    return torch.tensor(of_segment).repeat_interleave(torch.tensor(counts))
