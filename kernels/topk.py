"""The largest logits of every row, equals in order of their columns."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.kernels import native_sampling
from evospec.kernels.native import Team, address, load_library
from evospec.kernels.native_sampling import logit_rows, team_handle
from evospec.kernels.upload import upload

_LOW_BITS = 0x7FFFFFFF
_ROWS_AT_ONCE = 64
"""Keys take twice the memory of the logits."""


def topk_rows_by_keys(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None = None, rows: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk_rows`` on any device, by a partial selection; equals are told apart by one integer."""
    values, columns = decode_sort_keys(largest_keys(logits, k, rows))
    return values, columns if ids is None else ids[columns].long()


def largest_keys(logits: torch.Tensor, k: int, rows: Sequence[int] | None = None) -> torch.Tensor:
    """[N, min(k, V)] int64, largest first, for ``decode_sort_keys``; arguments as for ``topk_rows``."""
    places = None if rows is None else upload(logits.device, np.array(rows))[0]
    k = min(k, logits.shape[1])
    if logits.is_cuda:
        from evospec.kernels.triton.topk import largest_keys_triton

        return largest_keys_triton(logits, k, places)
    wanted = logits if places is None else logits[places]
    return torch.cat([_largest_of_keys(part, k) for part in torch.split(wanted, _ROWS_AT_ONCE)])


def _largest_of_keys(logits: torch.Tensor, k: int) -> torch.Tensor:
    bits = (logits + 0.0).view(torch.int32)  # -0 and 0 are equal
    ordered = (bits ^ ((bits >> 31) & _LOW_BITS)).long() << 32
    keys = ordered | (_LOW_BITS - torch.arange(logits.shape[1], device=logits.device))
    return keys.topk(k, dim=1).values


def decode_sort_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 and columns int64 of keys, int64: a logit's bits, put so that they grow with it, above its column
    counted backwards.
    """
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & _LOW_BITS)).view(torch.float32), _LOW_BITS - (keys & _LOW_BITS)


def topk_rows(
    logits: torch.Tensor,
    k: int,
    ids: torch.Tensor | None = None,
    team: Team | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest logits of each row in descending order; of equal ones the first column comes first.

    Args:
        logits: [N, V] float32 without NaN; more rows where ``rows`` are given.
        k: at least 1; where it exceeds V, all V are returned.
        ids: [V] integers to return instead of column numbers.
        team: threads of the compiled kernels (None: the calling one).
        rows: N numbers of rows of ``logits``, where not all are wanted.

    Returns:
        Values [N, min(k, V)] float32 and column numbers or ids, int64.
    """
    if not native_sampling.can_take(logits):
        return topk_rows_by_keys(logits, k, ids, rows)
    places = None if rows is None else array("i", rows)
    k, count = min(k, logits.shape[1]), len(logits) if places is None else len(places)
    values, indices = torch.empty(count, k), torch.empty(count, k, dtype=torch.int64)
    ids = None if ids is None else ids.int()  # named: a copy must outlive the call
    load_library().evo_top_k(
        *(team_handle(team), logit_rows(logits, places=places), k),
        *(address(ids), address(values), address(indices)),
    )
    return values, indices


def topk_rows_on_host(
    logits: torch.Tensor, k: int, team: Team | None = None, rows: Sequence[int] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """As ``topk_rows``, in arrays; a GPU is waited for once."""
    if logits.is_cuda:
        values, columns = decode_sort_keys(largest_keys(logits, k, rows).cpu())
    else:
        values, columns = topk_rows(logits, k, team=team, rows=rows)
    return values.numpy(), columns.numpy()
