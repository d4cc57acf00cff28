"""``kernels.logits_edits`` as Triton kernels."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _edit_kernel(logits, stride, rows, ends, token_ids, factors, addends, BLOCK: tl.constexpr):
    """Each program: one of the rows."""
    number = tl.program_id(0)
    begin, end = tl.load(ends + number - 1, mask=number > 0, other=0), tl.load(ends + number)
    of_row = logits + tl.load(rows + number) * stride
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        place = of_row + tl.load(token_ids + at, mask=inside, other=0)
        x = tl.load(place, mask=inside, other=0.0)
        factor, addend = tl.load(factors + at, mask=inside, other=1.0), tl.load(addends + at, mask=inside, other=0.0)
        scaled = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)
        tl.store(place, tl.where(addend == float("-inf"), addend, scaled + addend), mask=inside)


@triton.jit
def _mask_kernel(logits, stride, allowed, columns, BLOCK: tl.constexpr):
    """Each program: BLOCK columns of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    word = tl.load(allowed + row * tl.cdiv(columns, 32) + column // 32, mask=inside, other=0)
    place = logits + row * stride + column
    x = tl.load(place, mask=inside, other=0.0)
    is_out = (((word >> (column % 32)) & 1) == 0) & (x < float("inf"))
    tl.store(place, tl.where(is_out, float("-inf"), x), mask=inside)


def edit_triton(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor,
    token_ids: torch.Tensor,
    factors: torch.Tensor,
    addends: torch.Tensor,
) -> None:
    """``SparseEdits`` of logits [L, V] float32, in place."""
    _edit_kernel[(len(rows),)](logits, logits.stride(0), rows, ends, token_ids, factors, addends, BLOCK=_BLOCK)


def mask_triton(logits: torch.Tensor, allowed: torch.Tensor) -> None:
    """-inf in place of what is not ``allowed`` [L, ceil(V / 32)], unless it is +inf or no number."""
    num_rows, columns = logits.shape
    _mask_kernel[(num_rows, triton.cdiv(columns, _BLOCK))](logits, logits.stride(0), allowed, columns, BLOCK=_BLOCK)
