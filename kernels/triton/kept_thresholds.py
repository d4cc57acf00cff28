"""``kernels.kept_thresholds`` as a Triton kernel, from a row's largest logits; nobody waits to see if they suffice.

Where they do not hold every token that is kept, it says so, and that row is looked at again.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from evospec.kernels.kept_thresholds import Limits

_BLOCK = 1024


@triton.jit
def _thresholds_kernel(
    logits,
    stride,
    values,
    temperatures,
    top_k,
    top_p,
    min_p,
    least,
    suffices,
    columns,
    num_values,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program: one row. ``VALUES``: ``num_values``, rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    divisor = tl.where(temperature == 0.0, 1.0, temperature).to(tl.float64)
    at = tl.arange(0, VALUES)
    value = tl.load(values + row * num_values + at, mask=at < num_values, other=float("-inf"))
    largest = tl.max(value, axis=0)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < columns, other=float("-inf"))
        total += tl.sum(tl.exp((x - largest).to(tl.float64) / divisor), axis=0)
    k = tl.load(top_k + row)
    has_top_k = (k > 0) & (k < columns)
    kth = tl.max(tl.where(at == tl.where(has_top_k, k - 1, VALUES), value, float("-inf")), axis=0)
    mass = tl.cumsum(tl.where(value >= kth, tl.exp((value - largest).to(tl.float64) / divisor), 0.0), axis=0)
    total = tl.where(has_top_k, tl.max(mass, axis=0), total)
    p = tl.load(top_p + row)
    end = tl.min(tl.where(mass >= p * total, at, VALUES), axis=0)
    nucleus = tl.max(tl.where(at == tl.where(p < 1.0, end, VALUES), value, float("-inf")), axis=0)
    min_share = tl.load(min_p + row)
    lowest = largest + temperature * tl.log(min_share).to(tl.float32)
    keeps_all = (temperature == 0.0) | ((p >= 1.0) & (min_share <= 0.0) & (has_top_k == 0))
    threshold = tl.where(keeps_all, float("-inf"), tl.maximum(tl.maximum(kth, nucleus), lowest))
    # The last of the values may have equals that were left out.
    last = tl.min(tl.where(at < num_values, value, float("inf")), axis=0)
    is_enough = keeps_all | (num_values == columns) | ((last < threshold) & ((has_top_k == 0) | (last < kth)))
    tl.store(least + row, threshold)
    tl.store(suffices + row, is_enough)


def kept_thresholds_triton(
    logits: torch.Tensor, temperatures: torch.Tensor, limits: Limits, num_values: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.kept_thresholds``, from each row's ``num_values`` largest logits.

    Returns:
        the thresholds [N] float32, and whether they are right [N] bool: more tokens may be kept than there are values.
    """
    rows, columns = logits.shape
    values = logits.topk(min(num_values, columns), dim=1).values
    least = torch.empty(rows, device=logits.device)
    suffices = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _thresholds_kernel[(rows,)](
        *(logits, logits.stride(0), values, temperatures, limits.top_k, limits.top_p, limits.min_p),
        *(least, suffices, columns, values.shape[1]),
        VALUES=triton.next_power_of_2(values.shape[1]),
        BLOCK=_BLOCK,
    )
    return least, suffices
