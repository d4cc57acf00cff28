"""What ``/v1/embeddings`` answers with: the mean of a prompt's hidden states, summed over the chunks of its prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evospec.engine.request import Request
from evospec.engine.step import ScheduledSequence


def collect_embeddings(sequences: Sequence[ScheduledSequence], hidden: torch.Tensor) -> None:
    """Take a step's hidden states, [T, hidden] after the final norm, of the sequences that want them.

    In float64, where another division into chunks changes only bits far below those of the float32 answer.
    """
    end = 0
    for sequence in sequences:
        begin, end = end, end + len(sequence.token_ids)
        request = sequence.request
        if request.wants_embedding:
            chunk = hidden[begin:end].double().sum(0)
            earlier = request.hidden_sum if sequence.start else None  # a preempted prompt is computed again
            request.hidden_sum = chunk if earlier is None else earlier + chunk


def take_embedding(request: Request) -> bytes | None:
    """The embedding of length 1, float32, once; None for requests that did not ask."""
    total, request.hidden_sum = request.hidden_sum, None
    return None if total is None else torch.nn.functional.normalize(total, dim=0).cpu().numpy().astype("<f4").tobytes()
