"""What ``/v1/embeddings`` answers with: the mean of a prompt's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.request import Request
from engine.step_plan import ScheduledSequence


class PromptEmbeddings:
    """Sums of hidden states over the chunks of a prefill; they leave with the request's first output.

    They are in float64, where another division into chunks changes only bits far below those of the float32 answer.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def collect(self, sequences: Sequence[ScheduledSequence], hidden: torch.Tensor) -> None:
        """Take a step's hidden states, [T, hidden] after the final norm, of the sequences that want them."""
        end = 0
        for sequence in sequences:
            begin, end = end, end + len(sequence.token_ids)
            if sequence.request.wants_embedding:
                request_id = sequence.request.request_id
                chunk = hidden[begin:end].double().sum(0)
                # From its first position on, a prompt is computed for the first time, or again after a preemption.
                self._sums[request_id] = self._sums[request_id] + chunk if sequence.start else chunk

    def take(self, request: Request) -> bytes | None:
        """The embedding of length 1, float32, once; None for requests that did not ask."""
        if (total := self._sums.pop(request.request_id, None)) is None:
            return None
        return torch.nn.functional.normalize(total, dim=0).cpu().numpy().astype("<f4").tobytes()

    def forget(self, request_id: str) -> None:
        """Drop an ended request's sum."""
        self._sums.pop(request_id, None)
