"""``kernels.topk`` as a Triton kernel: each program finds the best of a piece of a row, and the best of all are merged.

A logit and its column are one integer, whose order is that of the logits and, among equals, from the first column to
the last.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def sort_keys(logits, columns):
    """int64: the logit's bits, put so that they grow with it, above the column, counted backwards."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def _best_kernel(logits, stride, rows, keys, columns, HAS_ROWS: tl.constexpr, BEST: tl.constexpr, BLOCK: tl.constexpr):
    """Each program: the BEST of BLOCK columns of a row."""
    number, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = number
    if HAS_ROWS:
        row = tl.load(rows + number)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + column, mask=column < columns, other=float("-inf"))
    found = tl.where(column < columns, sort_keys(x, column), -(2**63))
    place = (number * tl.num_programs(1) + piece) * BEST + tl.arange(0, BEST)
    tl.store(keys + place, tl.topk(found, BEST))


def largest_keys_triton(logits: torch.Tensor, k: int, rows: torch.Tensor | None) -> torch.Tensor:
    """Keys [N, k] int64 of the largest logits, the largest first, of all rows or of some [N] int64."""
    count, columns = len(logits) if rows is None else len(rows), logits.shape[1]
    # Two at least: before Triton 3.9 `tl.topk` of one does not compile in one dimension.
    best, pieces = min(max(2, triton.next_power_of_2(k)), _BLOCK), triton.cdiv(columns, _BLOCK)
    keys = torch.empty(count, pieces * best, dtype=torch.int64, device=logits.device)
    _best_kernel[(count, pieces)](
        *(logits, logits.stride(0), logits if rows is None else rows, keys, columns),
        HAS_ROWS=rows is not None,
        BEST=best,
        BLOCK=_BLOCK,
    )
    return keys.topk(k, dim=1).values
