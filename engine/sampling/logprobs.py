"""Log-probabilities of the target model itself: temperature 1, before penalties and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.messages import TokenLogprob
from engine.request import Request
from engine.step_plan import ScheduledSequence
from kernels.log_probabilities import log_probabilities
from kernels.native import Team


def token_logprobs(
    logits: torch.Tensor,
    rows: Sequence[int],
    token_ids: Sequence[int],
    num_top: Sequence[int],
    team: Team | None = None,
) -> list[TokenLogprob]:
    """Log-probability of a token in each of some rows, and of the most likely ones.

    Serves sampled tokens, and prompts too: there row i's token is the prompt's token i + 1.

    Args:
        logits: [N, V] float32, the model's own.
        rows: R rows.
        token_ids: R tokens, one a row.
        num_top: R numbers of alternatives to report; 0 for none.
        team: threads of the compiled kernels (None: the calling one).
    """
    found = log_probabilities(logits, rows, token_ids, max(num_top, default=0), team)
    tops = [
        list(zip(ids[:count], values[:count], strict=True))
        for ids, values, count in zip(found.top_token_ids, found.top, num_top, strict=True)
    ]
    return [TokenLogprob(*entry) for entry in zip(token_ids, found.chosen, tops, strict=True)]


class PromptLogprobs:
    """Those of prompts' own tokens, over the chunks of a prefill; they leave with the request's first output."""

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
