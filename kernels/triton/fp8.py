"""``kernels.fp8.quantize_rows`` as a Triton kernel."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_COLUMNS = 2048
"""That a program reads at once"""


@triton.jit
def _quantize_kernel(x, codes, scales, size, largest, smallest, BLOCK: tl.constexpr):
    """Each program: a row, read twice."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(x + row * size + column, mask=column < size, other=0.0).to(tl.float32)))
    scale = tl.maximum(tl.max(most, axis=0) / largest, smallest)
    tl.store(scales + row, scale)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        tl.store(codes + row * size + column, (value / scale).to(codes.dtype.element_ty), mask=column < size)


def quantize_rows_triton(
    x: torch.Tensor, largest: float, smallest: float, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``quantize_rows``, with the largest code, the smallest scale, and the codes' dtype."""
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _quantize_kernel[(len(x),)](x, codes, scales, x.shape[1], largest, smallest, BLOCK=_COLUMNS)
    return codes, scales
