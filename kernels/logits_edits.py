"""Changes to logits that are a GPU's to keep: sparse ones by rows, and what bit masks forbid. One copy goes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.kernels.upload import upload


@dataclass(frozen=True)
class SparseEdits:
    """Of R rows: a logit above 0 is divided by the token's factor, others are multiplied; then something is added.

    No token comes twice in a row. An addend of -inf makes a logit -inf, whatever it is.
    """

    rows: NDArray[np.int64]
    """[R]"""
    ends: NDArray[np.int64]
    """[R]: where the tokens of each row end"""
    token_ids: NDArray[np.int64]
    """[N], row after row"""
    factors: NDArray[np.float32]
    """[N]"""
    addends: NDArray[np.float32]
    """[N]"""


def edit_on_gpu(logits: torch.Tensor, edits: Sequence[SparseEdits], allowed: NDArray[np.int32] | None) -> None:
    """Change logits [L, V] float32 in place.

    Args:
        logits: contiguous.
        edits: one after the other.
        allowed: [L, ceil(V / 32)] bits of the tokens that stay, in the end (None: all). Of a logit that is +inf or no
            number so much is kept.
    """
    if not edits and allowed is None:
        return
    from evospec.kernels.triton.logits_edits import edit_triton, mask_triton

    arrays = [array for edit in edits for array in vars(edit).values()]
    uploaded = upload(logits.device, *arrays, *([] if allowed is None else [allowed]))
    for start in range(0, len(arrays), 5):
        edit_triton(logits, *uploaded[start : start + 5])
    if allowed is not None:
        mask_triton(logits, uploaded[-1])
