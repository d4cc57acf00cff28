"""One token a row: the largest logit, or a sample of what top-k, top-p and min-p keep."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.kernels import native_sampling
from evospec.kernels.gumbel_argmax import gumbel_argmax, row_keys, seeds_tensor, signed
from evospec.kernels.kept_thresholds import Limits, kept_thresholds
from evospec.kernels.native import Team, address, load_library, pointers
from evospec.kernels.native_sampling import logit_rows, team_handle
from evospec.kernels.upload import upload

_CANDIDATES = 1024
"""Of a row's largest logits, so many are looked at first on a GPU."""
UNDECIDED = -2
"""In place of a token: these did not suffice."""


class GumbelRows(ctypes.Structure):
    _fields_ = pointers("seeds", "positions", "token_ids", "temperatures", "limits", "undefined")


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

    def padded(self, size: int) -> RowSampling:
        """With further rows, which are greedy."""
        both = zip(vars(self).values(), vars(_greedy(size - len(self.temperatures))).values(), strict=True)
        return RowSampling(*([*ours, *further] for ours, further in both))

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
        allowed: [N, ceil(V / 32)] int32, bits of the columns that may be chosen (None: all; on a GPU all may).
        team: threads of the compiled kernels (None: the calling one).

    Returns:
        the tokens, -1 for rows with a logit that is NaN or +inf: nothing is defined to be chosen there.
    """
    if native_sampling.can_take(logits):
        return _choose_by_compiled_kernel(logits, sampling, positions, token_ids, allowed, team)
    if logits.is_cuda:
        return _choose_on_gpu(logits, sampling, positions, token_ids)
    if sampling is None and token_ids is None and allowed is None:
        chosen = logits.argmax(dim=1)
    else:
        chosen = _choose_by_tensors(logits, sampling or _greedy(len(logits)), positions, token_ids, allowed)
    return _defined(logits, chosen).tolist()


def _greedy(rows: int) -> RowSampling:
    return RowSampling([0.0] * rows, [0] * rows, [0] * rows, [1.0] * rows, [0.0] * rows)


def _defined(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """-1 instead of what was chosen where nothing is defined to be."""
    return chosen.masked_fill(~(logits < torch.inf).all(dim=1), -1)


def _choose_by_compiled_kernel(
    logits: torch.Tensor,
    sampling: RowSampling | None,
    positions: Sequence[int],
    token_ids: torch.Tensor | None,
    allowed: torch.Tensor | None,
    team: Team | None,
) -> list[int]:
    # Python's own arrays: where there are few rows, every call of a tensor library costs more than what it holds.
    count = logits.shape[0]
    out, undefined = array("q", bytes(8 * count)), array("B", bytes(count))
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


def _choose_on_gpu(
    logits: torch.Tensor, sampling: RowSampling | None, positions: Sequence[int], token_ids: torch.Tensor | None
) -> list[int]:
    """One upload, and one wait; another for the rows whose limits keep more tokens than were looked at."""
    rows, is_truncated = None, sampling is not None and sampling.is_truncated
    if sampling is not None or token_ids is not None:
        *of_rows, keys = upload(logits.device, *choice_arrays(sampling or _greedy(len(logits)), positions))
        rows = GpuRows.of(of_rows, keys)
    tokens: list[int] = launch_choice(logits, rows, token_ids, is_truncated=is_truncated).tolist()
    if UNDECIDED in tokens:
        assert rows is not None
        least = kept_thresholds(logits, rows.temperatures, rows.limits)
        tokens = _defined(logits, rows.choose(logits, token_ids, least)).tolist()
    return tokens


def launch_choice(
    logits: torch.Tensor, rows: GpuRows | None, token_ids: torch.Tensor | None = None, *, is_truncated: bool
) -> torch.Tensor:
    """As ``choose_tokens`` on a GPU, without waiting: [N] int64, UNDECIDED where a row's largest logits do not suffice.

    Args:
        logits: [N, V] or [N, K] float32.
        rows: how tokens are chosen (None: the largest logit).
        token_ids: [N, K], the tokens that the columns stand for.
        is_truncated: whether any token may be cut off.
    """
    if rows is None:
        chosen = logits.argmax(dim=1)
    elif is_truncated:
        least, suffices = rows.thresholds(logits)
        chosen = rows.choose(logits, token_ids, least).masked_fill(~suffices, UNDECIDED)
    else:
        chosen = rows.choose(logits, token_ids)
    return _defined(logits, chosen)


@dataclass(frozen=True)
class GpuRows:
    """``RowSampling`` on a GPU."""

    temperatures: torch.Tensor
    """[N] float32"""
    limits: Limits
    keys: torch.Tensor
    """[N] int64, of their noise"""

    @classmethod
    def of(cls, arrays: Sequence[torch.Tensor], keys: torch.Tensor) -> GpuRows:
        """From ``choice_arrays`` there."""
        return cls(arrays[0], Limits(*arrays[1:]), keys)

    def thresholds(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row [N] float32, and whether some of its largest logits have sufficed to tell [N] bool."""
        from evospec.kernels.triton.kept_thresholds import kept_thresholds_triton

        return kept_thresholds_triton(logits, self.temperatures, self.limits, _CANDIDATES)

    def choose(
        self, logits: torch.Tensor, token_ids: torch.Tensor | None, least: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens [N] int64, as ``choose_tokens`` says, of logits that reach ``least``; nobody waits for them."""
        from evospec.kernels.triton.gumbel_argmax import gumbel_argmax_triton

        return gumbel_argmax_triton(logits, self.keys, token_ids, temperatures=self.temperatures, least=least)


def choice_arrays(sampling: RowSampling, positions: Sequence[int]) -> list[NDArray[Any]]:
    """What ``GpuRows`` has: temperatures, the three limits, and the keys of the noise at the positions, all [N]."""
    keys = row_keys(seeds_tensor(list(sampling.seeds)), torch.tensor(positions, dtype=torch.int64))
    arrays = sampling.arrays()
    return [*(np.asarray(arrays[name]) for name in _LIMITS), keys.numpy()]


def _choose_by_tensors(
    logits: torch.Tensor,
    sampling: RowSampling,
    positions: Sequence[int],
    token_ids: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    """On a CPU without the compiled kernels."""
    seeds, places = seeds_tensor(list(sampling.seeds)), torch.tensor(positions, dtype=torch.int64)
    temperatures, least = torch.tensor(sampling.temperatures, dtype=torch.float32), None
    if sampling.is_truncated:
        limits = Limits(*map(torch.from_numpy, choice_arrays(sampling, positions)[1:4]))
        least = kept_thresholds(logits, temperatures, limits, allowed)
    return gumbel_argmax(logits, seeds, places, token_ids, temperatures=temperatures, least=least, allowed=allowed)
