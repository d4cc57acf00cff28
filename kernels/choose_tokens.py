"""One token a row: the largest logit, or a sample of what top-k, top-p and min-p keep."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels import native_sampling
from kernels.gumbel_argmax import gumbel_argmax, row_keys, seeds_tensor, signed
from kernels.kept_thresholds import Limits, kept_thresholds
from kernels.native import Team, address, load_library, pointers
from kernels.native_sampling import logit_rows, team_handle


class GumbelRows(ctypes.Structure):
    _fields_ = pointers("seeds", "positions", "token_ids", "temperatures", "least", "limits", "undefined")


_LIMITS = ("temperatures", "top_k", "top_p", "min_p")


class TruncationRows(ctypes.Structure):
    _fields_ = pointers(*_LIMITS)


@dataclass(frozen=True)
class RowSampling:
    """How the tokens of rows are chosen, one entry a row; off are top_k 0, top_p 1 and min_p 0."""

    temperatures: Sequence[float]
    """0: greedy, whatever the limits"""
    seeds: Sequence[int]
    """Of any size; their lowest 64 bits count"""
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]

    @property
    def is_truncated(self) -> bool:
        """Whether any token may be cut off."""
        return max(self.top_k) > 0 or min(self.top_p) < 1.0 or max(self.min_p) > 0.0

    def arrays(self) -> dict[str, array[Any]]:
        """By name, as the compiled kernels take them."""
        return {
            "temperatures": array("f", self.temperatures),
            "seeds": array("q", [signed(seed, 64) for seed in self.seeds]),
            "top_k": array("i", self.top_k),
            "top_p": array("d", self.top_p),
            "min_p": array("d", self.min_p),
        }


def choose_tokens(
    logits: torch.Tensor,
    sampling: RowSampling | None,
    positions: Sequence[int],
    token_ids: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    team: Team | None = None,
) -> list[int]:
    """The token of every row: the largest logit where greedy, else a Gumbel argmax over what is not cut off.

    Args:
        logits: [N, V] float32, or [N, K] for a subset of tokens.
        sampling: of the rows; None: all greedy.
        positions: index of the chosen token in its sequence, one a row.
        token_ids: [N, K] int32, the tokens that the columns stand for (None: 0 .. V - 1).
        allowed: [N, ceil(V / 32)] int32, bits of the columns that may be chosen (None: all).
        team: threads of the compiled kernels (None: the calling one).

    Returns:
        the tokens, -1 for rows with a logit that is NaN or +inf: nothing is defined to be chosen there.
    """
    if native_sampling.can_take(logits):
        return _choose_by_compiled_kernel(logits, sampling, positions, token_ids, allowed, team)
    if sampling is None and token_ids is None and allowed is None:
        chosen = logits.argmax(dim=1)
    else:
        chosen = _choose_by_tensors(logits, sampling, positions, token_ids, allowed)
    is_defined = (logits < torch.inf).all(dim=1)
    return torch.where(is_defined, chosen, -1).tolist()


def _choose_by_compiled_kernel(
    logits: torch.Tensor,
    sampling: RowSampling | None,
    positions: Sequence[int],
    token_ids: torch.Tensor | None,
    allowed: torch.Tensor | None,
    team: Team | None,
) -> list[int]:
    # Python's own arrays: where there are few rows, every call of a tensor library costs more than what it holds.
    out, undefined = array("q", bytes(8 * len(logits))), array("B", bytes(len(logits)))
    how = GumbelRows(token_ids=address(token_ids), undefined=undefined.buffer_info()[0])
    if sampling is not None:
        arrays = {"positions": array("q", positions), **sampling.arrays()}
        places = {name: values.buffer_info()[0] for name, values in arrays.items()}
        how.seeds, how.positions, how.temperatures = (places[name] for name in ("seeds", "positions", "temperatures"))
        if sampling.is_truncated:
            limits = TruncationRows(*(places[name] for name in _LIMITS))
            how.limits = ctypes.addressof(limits)
    load_library().evo_gumbel_argmax(
        team_handle(team), logit_rows(logits, allowed), ctypes.byref(how), ctypes.c_void_p(out.buffer_info()[0])
    )
    if any(undefined):
        return [-1 if is_undefined else token_id for token_id, is_undefined in zip(out, undefined, strict=True)]
    return out.tolist()


def _choose_by_tensors(
    logits: torch.Tensor,
    sampling: RowSampling | None,
    positions: Sequence[int],
    token_ids: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    device = logits.device
    allowed = None if allowed is None else allowed.to(device)
    places = torch.tensor(positions, dtype=torch.int64, device=device)
    least = None
    if sampling is None:
        seeds, temperatures = torch.zeros_like(places), torch.zeros(len(logits), device=device)
    else:
        seeds = seeds_tensor(list(sampling.seeds), device)
        temperatures = torch.tensor(sampling.temperatures, dtype=torch.float32, device=device)
        if sampling.is_truncated:
            limits = Limits(
                torch.tensor(sampling.top_k, dtype=torch.int32, device=device),
                torch.tensor(sampling.top_p, dtype=torch.float64, device=device),
                torch.tensor(sampling.min_p, dtype=torch.float64, device=device),
            )
            least = kept_thresholds(logits, temperatures, limits, allowed)
    if device.type == "cuda":
        from kernels.triton.gumbel_argmax import gumbel_argmax_triton

        keys = row_keys(seeds, places)
        return gumbel_argmax_triton(logits, keys, token_ids, temperatures=temperatures, least=least, allowed=allowed)
    return gumbel_argmax(logits, seeds, places, token_ids, temperatures=temperatures, least=least, allowed=allowed)
