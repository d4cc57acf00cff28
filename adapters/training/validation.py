"""How well a draft does on answers that it was not trained on: accuracy of each unrolled step, over the full head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from adapters.training.dataset import Batch
from adapters.training.unroll import Unroller

_CHUNK = 512


@dataclass(frozen=True)
class Accuracy:
    """``steps[j]``: share of positions whose step j names the target's most likely token, the text before it given.

    ``acceptance_length``: mean tokens a verification with ``len(steps)`` drafts would give, the bonus token included.
    """

    steps: tuple[float, ...]
    acceptance_length: float


@torch.inference_mode()
def validate(unroller: Unroller, batches: Sequence[Batch], num_steps: int = 4) -> Accuracy:
    """Teacher-forced: a chain's later tokens are the answer's own."""
    hits = [0] * num_steps
    counts = [0] * num_steps
    accepted, chains = 0, 0
    with unroller.precision():
        for batch in batches:
            labels = batch.labels.flatten(0, 1).to(unroller.target.head.dtype)
            right = _most_likely(unroller.target.head_input(labels), unroller).view(batch.labels.shape[:2])
            walk, alive = unroller.walk(batch), batch.lengths >= num_steps
            chains += int(alive.sum())
            for step in range(num_steps):
                if step:
                    walk.advance(batch.lengths[walk.chains] > step)
                hit = _most_likely(walk.head_input, unroller) == right[walk.rows, walk.ends]
                hits[step] += int(hit.sum())
                counts[step] += len(hit)
                alive[walk.chains] &= hit
                accepted += int(alive.sum())
    steps = tuple(hit / max(1, count) for hit, count in zip(hits, counts, strict=True))
    return Accuracy(steps, 1 + accepted / max(1, chains))


def _most_likely(hidden: torch.Tensor, unroller: Unroller) -> torch.Tensor:
    head = unroller.target.head
    return torch.cat([F.linear(chunk.to(head.dtype), head).argmax(-1) for chunk in torch.split(hidden, _CHUNK)])
