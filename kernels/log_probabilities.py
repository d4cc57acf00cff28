"""Log-probabilities of some rows: of a token each, and of the most likely ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels import native_sampling
from kernels.topk import topk_rows

if TYPE_CHECKING:
    from kernels.native import Team


class LogProbabilities(NamedTuple):
    """Of R rows."""

    chosen: list[float]
    """[R] of each row's token"""
    top_token_ids: list[list[int]]
    """[R][k] the most likely, equals in order of their ids"""
    top: list[list[float]]
    """[R][k] theirs"""


def log_probabilities(
    logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], k: int, team: Team | None = None
) -> LogProbabilities:
    """Log-probabilities in some rows of logits.

    Args:
        logits: [N, V] float32 without NaN.
        rows: R rows.
        token_ids: R tokens, one a row; below V (not checked).
        k: how many of the most likely are wanted; 0 for none.
        team: threads of the compiled kernels (None: the calling one).
    """
    k = min(k, logits.shape[1])
    if native_sampling.can_take(logits):
        return LogProbabilities(*native_sampling.log_probabilities(logits, rows, token_ids, k, team))
    wanted = logits[torch.tensor(rows, device=logits.device)]
    log_totals = wanted.logsumexp(dim=1, keepdim=True).double()
    chosen = wanted.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)) - log_totals
    if k == 0:
        return LogProbabilities(chosen.flatten().tolist(), [[] for _ in rows], [[] for _ in rows])
    values, columns = topk_rows(wanted, k)
    return LogProbabilities(chosen.flatten().tolist(), columns.tolist(), (values - log_totals).tolist())
