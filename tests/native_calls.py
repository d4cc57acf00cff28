"""Compiled kernels that the product only runs as parts of others; their specifications where nothing is compiled."""

from __future__ import annotations

import ctypes

import torch

from evospec.kernels import gumbel_argmax as by_tensors
from evospec.kernels import kept_thresholds as kept_by_tensors
from evospec.kernels import native
from evospec.kernels.choose_tokens import GumbelRows, TruncationRows
from evospec.kernels.kept_thresholds import Limits
from evospec.kernels.native import Team, address, load_library
from evospec.kernels.native_sampling import logit_rows, team_handle


def gumbel_argmax(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor | None = None,
    *,
    temperatures: torch.Tensor | None = None,
    team: Team | None = None,
) -> torch.Tensor:
    """As ``kernels.gumbel_argmax``."""
    if native.unsupported_reason() is not None:
        return by_tensors.gumbel_argmax(logits, seeds, positions, token_ids, temperatures=temperatures)
    out = torch.empty(len(logits), dtype=torch.int64)
    ids = None if token_ids is None else token_ids.int().contiguous()
    temperatures = torch.ones(len(logits)) if temperatures is None else temperatures
    how = GumbelRows(*(address(tensor) for tensor in (seeds, positions, ids, temperatures)))
    load_library().evo_gumbel_argmax(team_handle(team), logit_rows(logits), ctypes.byref(how), address(out))
    return out


def kept_thresholds(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    limits: Limits,
    allowed: torch.Tensor | None = None,
    team: Team | None = None,
) -> torch.Tensor:
    """As ``kernels.kept_thresholds``."""
    if native.unsupported_reason() is not None:
        return kept_by_tensors.kept_thresholds(logits, temperatures, limits, allowed)
    out = torch.empty(len(logits))
    of_rows = (temperatures, limits.top_k, limits.top_p, limits.min_p)
    rows = TruncationRows(*(address(tensor) for tensor in of_rows))
    load_library().evo_kept_thresholds(team_handle(team), logit_rows(logits, allowed), ctypes.byref(rows), address(out))
    return out
