"""Log-probabilities of the target model itself: temperature 1, before penalties and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.messages import TokenLogprob
from kernels.log_probabilities import log_probabilities

if TYPE_CHECKING:
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
