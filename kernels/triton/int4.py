"""``kernels.int4`` as Triton kernels."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_TOKENS = 32  # of a program, however many there are: so a row's sum is always made in the same order
_BLOCKS = 8  # at a time, one a warp, which adds up every eighth block of all rows
_FEW_ROWS = 8192  # a matrix has fewer than these: smaller programs, so that each multiprocessor has one
_EXPANDED = 256  # blocks of a program
_BYTES = tl.constexpr(16)  # of a block
_STAGES = tl.constexpr(4)


@triton.jit
def _scale_and_minimum(pairs):
    """Two float16 that were read as one int32, as float32."""
    scale = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _weight(code, scale, minimum, dtype):
    """``scale`` * ``code``, which is exact, + ``minimum``. A code becomes a float32 as the last bits of 2^23."""
    return (scale * ((code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) + minimum).to(dtype)


@triton.jit(do_not_specialize=["num_tokens"])  # only compared with: a batch of another size compiles nothing anew
def _int4_kernel(
    x,
    codes,
    scales,
    out,
    num_tokens,
    num_rows,
    num_blocks,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Each program: ``ROWS`` rows of the matrix for ``TOKENS`` tokens.

    Programs of the same rows follow each other, so that all but the first find them in the cache. Products are batches
    of ``BLOCKS``, each of which a warp adds up alone; their sums are added at the end.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, _BYTES)
    is_token, is_row = token < num_tokens, row < num_rows
    of_row, of_token = row.to(tl.int64) * num_blocks, token.to(tl.int64) * (num_blocks * 32)
    sums = tl.zeros((BLOCKS, TOKENS, ROWS), dtype=tl.float32)
    for start in tl.range(0, num_blocks, BLOCKS, num_stages=_STAGES):
        block = start + tl.arange(0, BLOCKS)
        is_block = block < num_blocks
        at, is_here = of_row[None, :] + block[:, None], is_block[:, None] & is_row[None, :]
        pairs = tl.load(scales + at, mask=is_here, other=0)
        place = codes + (at[:, :, None] * _BYTES + byte[None, None, :])
        code = tl.load(place, mask=is_here[:, :, None], other=0).to(tl.int32)
        column = x + of_token[None, :, None] + (block[:, None, None] * 32 + byte[None, None, :])
        is_x = is_block[:, None, None] & is_token[None, :, None]
        low = tl.load(column, mask=is_x, other=0.0)
        high = tl.load(column + _BYTES, mask=is_x, other=0.0)
        scale, minimum = _scale_and_minimum(pairs)
        of_low = _weight(code & 15, scale[:, :, None], minimum[:, :, None], x.dtype.element_ty)
        of_high = _weight(code >> 4, scale[:, :, None], minimum[:, :, None], x.dtype.element_ty)
        sums = tl.dot(low, tl.permute(of_low, (0, 2, 1)), sums, input_precision="ieee")
        sums = tl.dot(high, tl.permute(of_high, (0, 2, 1)), sums, input_precision="ieee")
    place = out + token[:, None].to(tl.int64) * num_rows + row[None, :]
    tl.store(place, tl.sum(sums, axis=0).to(out.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


@triton.jit
def _expand_kernel(codes, scales, out, num_blocks, BLOCKS: tl.constexpr):
    """Each program: ``BLOCKS`` blocks; all of a matrix's are one row after the other."""
    block, byte = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, _BYTES)
    is_block = block < num_blocks
    scale, minimum = _scale_and_minimum(tl.load(scales + block, mask=is_block, other=0)[:, None])
    code = tl.load(codes + block[:, None] * _BYTES + byte[None, :], mask=is_block[:, None], other=0).to(tl.int32)
    place = out + block[:, None] * 32 + byte[None, :]
    tl.store(place, _weight(code & 15, scale, minimum, out.dtype.element_ty), mask=is_block[:, None])
    tl.store(place + _BYTES, _weight(code >> 4, scale, minimum, out.dtype.element_ty), mask=is_block[:, None])


def int4_product_triton(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """As ``int4_product``, for any number of rows."""
    x, (num_rows, num_blocks, _) = x.contiguous(), scales.shape
    out = torch.empty(len(x), num_rows, dtype=x.dtype, device=x.device)
    height = 32 if num_rows < _FEW_ROWS else 64
    _int4_kernel[(triton.cdiv(len(x), _TOKENS), triton.cdiv(num_rows, height))](
        *(x, codes, scales.view(torch.int32), out, len(x), num_rows, num_blocks),
        **{"TOKENS": _TOKENS, "ROWS": height, "BLOCKS": _BLOCKS, "num_warps": _BLOCKS},
    )
    return out


def dequantized_triton(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As ``dequantized``."""
    num_rows, num_blocks, _ = scales.shape
    out = torch.empty(num_rows, num_blocks * 32, dtype=dtype, device=codes.device)
    count = num_rows * num_blocks
    _expand_kernel[(triton.cdiv(count, _EXPANDED),)](codes, scales.view(torch.int32), out, count, BLOCKS=_EXPANDED)
    return out
