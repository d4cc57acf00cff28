"""Log-probabilities of some rows: of a token each, and of the most likely ones."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from evospec.kernels import native_sampling
from evospec.kernels.native import Team, integers, load_library, pointers
from evospec.kernels.native_sampling import logit_rows, team_handle
from evospec.kernels.topk import decode_sort_keys, largest_keys
from evospec.kernels.upload import upload


class _Wanted(ctypes.Structure):
    _fields_ = (*integers("k"), *pointers("token_ids", "chosen", "largest", "columns"))


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
        return _by_compiled_kernel(logits, rows, token_ids, k, team)
    places, chosen = upload(logits.device, np.array(rows), np.array(token_ids))
    wanted = logits[places]
    numbers = torch.cat((wanted.gather(1, chosen.unsqueeze(1)), wanted.logsumexp(dim=1, keepdim=True)), dim=1)
    found = [numbers.double().view(torch.int64)]
    if k:
        found.append(largest_keys(wanted, k))
    of_rows = torch.cat(found, dim=1).cpu()  # a GPU is waited for once
    of_tokens = of_rows[:, :2].contiguous().view(torch.float64)
    logits_of_tokens, log_totals = of_tokens[:, 0], of_tokens[:, 1:]
    values, columns = decode_sort_keys(of_rows[:, 2:])
    chosen_values = logits_of_tokens - log_totals[:, 0]
    return LogProbabilities(chosen_values.tolist(), columns.tolist(), (values - log_totals).tolist())


def _by_compiled_kernel(
    logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], k: int, team: Team | None
) -> LogProbabilities:
    count = len(rows)
    places, tokens = array("i", rows), array("i", token_ids)
    chosen, largest = array("d", bytes(8 * count)), array("d", bytes(8 * count * k))
    columns = array("i", bytes(4 * count * k))
    wanted = _Wanted(k, *(one.buffer_info()[0] for one in (tokens, chosen, largest, columns)))
    load_library().evo_log_probabilities(team_handle(team), logit_rows(logits, places=places), ctypes.byref(wanted))
    starts = range(0, count * k, k) if k else [0] * count
    top = [largest[start : start + k].tolist() for start in starts]
    return LogProbabilities(chosen.tolist(), [columns[start : start + k].tolist() for start in starts], top)
