"""The largest logits of every row, equals in order of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kernels import native_sampling

if TYPE_CHECKING:
    from kernels.native import Team

_LOW_BITS = 0x7FFFFFFF
_ROWS_AT_ONCE = 64
"""Keys take twice the memory of the logits."""


def topk_rows_reference(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of ``topk_rows``."""
    values, columns = logits.sort(dim=1, descending=True, stable=True)
    values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
    return values, columns if ids is None else ids[columns].long()


def topk_rows_by_keys(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a partial selection, where the reference sorts whole rows; equals are told apart by one integer."""
    parts = [_largest_of_keys(part, min(k, logits.shape[1])) for part in torch.split(logits, _ROWS_AT_ONCE)]
    values, columns = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, columns if ids is None else ids[columns].long()


def _largest_of_keys(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32)  # -0 and 0 are equal
    ordered = (bits ^ ((bits >> 31) & _LOW_BITS)).long() << 32
    keys = ordered | (_LOW_BITS - torch.arange(logits.shape[1], device=logits.device))
    return decode_sort_keys(keys.topk(k, dim=1).values)


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
        compute = topk_rows_by_keys if logits.device.type == "cuda" else topk_rows_reference
        return compute(logits if rows is None else logits[list(rows)], k, ids)
    if ids is not None and ids.dtype != torch.int32:
        ids = ids.int()
    return native_sampling.topk_rows(logits, min(k, logits.shape[1]), ids, team, rows)
