"""Log-probabilities of the target model itself: temperature 1, before penalties and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.messages import TokenLogprob
from kernels.topk import topk_with_log_totals

if TYPE_CHECKING:
    from kernels.native import Team


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int], team: Team | None = None
) -> list[TokenLogprob]:
    """Log-probability of each row's token and of the most likely ones.

    Serves sampled tokens, and prompts too: there row i's token is the prompt's token i + 1.

    Args:
        logits: [R, V] float32, the model's own.
        token_ids: R tokens, one a row.
        num_top: R numbers of alternatives to report; 0 for none.
        team: threads of the compiled kernels (None: the calling one).
    """
    values, ids, log_totals = topk_with_log_totals(logits, max(num_top, default=0), team)
    log_totals = log_totals.unsqueeze(1)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)) - log_totals
    rows = zip(ids.tolist(), (values - log_totals).tolist(), num_top, strict=True)
    tops = [list(zip(row_ids[:n], row_values[:n], strict=True)) for row_ids, row_values, n in rows]
    return [TokenLogprob(*entry) for entry in zip(token_ids, chosen.flatten().tolist(), tops, strict=True)]
