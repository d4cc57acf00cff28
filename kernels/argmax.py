"""The most likely token of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import native_sampling

if TYPE_CHECKING:
    from kernels.native import Team


def argmax_rows(logits: torch.Tensor, team: Team | None = None) -> list[int]:
    """Column of the largest value of each row of logits [N, V]; the first of equal ones.

    ``team``: threads of the compiled kernels (None: the calling one).
    """
    is_native = native_sampling.can_take(logits)
    choices = native_sampling.argmax_rows(logits, team) if is_native else logits.argmax(dim=1)
    token_ids: list[int] = choices.tolist()
    return token_ids
