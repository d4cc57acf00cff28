"""Log-probabilities of the target model itself: temperature 1, before penalties and masks."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from evospec.engine.messages import TokenLogprob
from evospec.engine.step import ScheduledSequence
from evospec.kernels.log_probabilities import log_probabilities
from evospec.kernels.native import Team


def token_logprobs(
    logits: torch.Tensor,
    rows: Sequence[int],
    token_ids: Sequence[int],
    num_top: Sequence[int],
    team: Team | None = None,
) -> list[TokenLogprob]:
    """Log-probability of a token in each of some rows, and of the most likely ones.

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


def collect_prompt_logprobs(sequence: ScheduledSequence, logits: torch.Tensor) -> None:
    """Give a request that wants them those of its prompt in a step's rows [num_logits, vocab].

    Sampling rows, which come last, are passed over.
    """
    request, start = sequence.request, sequence.start
    pieces = (request.prompt_logprobs if start else None) or []  # a preempted prompt is computed again
    request.prompt_logprobs = pieces
    next_tokens = request.prompt_token_ids[start + 1 : start + 1 + len(logits)]
    if next_tokens:
        num_top = [request.sampling.prompt_logprobs or 0] * len(next_tokens)
        pieces.append(msgspec.msgpack.encode(token_logprobs(logits, range(len(next_tokens)), next_tokens, num_top)))
