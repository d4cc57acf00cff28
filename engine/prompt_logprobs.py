"""Log-probabilities of a prompt's own tokens, gathered over the chunks of its prefill."""

from __future__ import annotations

import torch

from engine.messages import TokenLogprob
from engine.request import Request
from engine.sampling.logprobs import token_logprobs
from engine.step_plan import ScheduledSequence


class PromptLogprobs:
    """Collects rows while a prompt is computed; the result leaves with the request's first output."""

    def __init__(self) -> None:
        self._entries: dict[str, list[TokenLogprob]] = {}

    def collect(self, sequence: ScheduledSequence, logits: torch.Tensor) -> None:
        """Take the rows of one step: logits [num_logits, vocab]. Sampling rows are passed over."""
        request, start = sequence.request, sequence.start
        if not request.wants_prompt_logits:  # the output has begun: they are complete
            return
        entries = self._entries.setdefault(request.request_id, [])
        del entries[start:]  # a preempted prompt is computed again
        next_tokens = request.prompt_token_ids[start + 1 : start + 1 + len(logits)]
        num_top = request.sampling.prompt_logprobs or 0
        if next_tokens:
            rows = range(len(next_tokens))
            entries += token_logprobs(logits, rows, next_tokens, [num_top] * len(rows))

    def take(self, request: Request) -> list[TokenLogprob] | None:
        """All entries, once; None for requests that did not ask."""
        if request.sampling.prompt_logprobs is None:
            return None
        return self._entries.pop(request.request_id, None)

    def forget(self, request_id: str) -> None:
        """Drop an ended request's entries."""
        self._entries.pop(request_id, None)
