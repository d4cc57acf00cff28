"""The largest logits of every row, equals in order of their columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import native_sampling

if TYPE_CHECKING:
    from kernels.native import Team


def topk_rows_reference(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of ``topk_rows``."""
    values, columns = logits.sort(dim=1, descending=True, stable=True)
    values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
    return values, columns if ids is None else ids[columns].long()


def topk_rows(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None = None, team: Team | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest logits of each row in descending order; of equal ones the first column comes first.

    Args:
        logits: [N, V] float32 without NaN.
        k: at least 1; where it exceeds V, all V are returned.
        ids: [V] integers to return instead of column numbers.
        team: threads of the compiled kernels (None: the calling one).

    Returns:
        Values [N, min(k, V)] float32 and column numbers or ids, int64.
    """
    if not native_sampling.can_take(logits):
        return topk_rows_reference(logits, k, ids)
    if ids is not None and ids.dtype != torch.int32:
        ids = ids.int()
    return native_sampling.topk_rows(logits, min(k, logits.shape[1]), ids, team)
