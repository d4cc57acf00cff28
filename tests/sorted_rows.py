"""The specification of ``kernels.topk``."""

from __future__ import annotations

import torch


def topk_rows_reference(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """By a stable sort of whole rows."""
    values, columns = logits.sort(dim=1, descending=True, stable=True)
    values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
    return values, columns if ids is None else ids[columns].long()
