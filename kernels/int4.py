"""Products with matrices of 4 bits, whose every 32 columns have a scale and a minimum, as GGUF's Q4_1 has them."""

from __future__ import annotations

import torch

BLOCK = 32
"""Columns that have a scale and a minimum."""
MOST_TOKENS = 64
"""That a matrix is multiplied with as it is. With more it is expanded, piece by piece."""
PIECE = 2**24
"""Weights that are expanded at once: 32 MiB in bfloat16, which lie in the cache of large GPUs until they are read."""
_HEIGHT = 128
"""Rows of a piece are a multiple of it, as of the tiles of matrix products."""


def int4_product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x weight^T, of weights that are scale * code + minimum, rounded to ``x``'s dtype.

    Of up to ``MOST_TOKENS`` rows, the result of one does not depend on how many there are.

    Args:
        x: [T, k], floating-point; T > 0, and k is a multiple of ``BLOCK``.
        codes: [n, k / 2] uint8, contiguous. Byte j of a block's 16 has the code of its column j in the low four bits
            and that of column j + 16 in the high ones.
        scales: [n, k / 32, 2] float16, contiguous: each block's scale, and its minimum.

    Returns:
        [T, n], ``x``'s dtype.
    """
    if x.device.type == "cuda" and len(x) <= MOST_TOKENS:
        from evospec.kernels.triton.int4 import int4_product_triton

        return int4_product_triton(x, codes, scales)
    out = x.new_empty(len(x), len(codes))
    height = max(PIECE // x.shape[1] // _HEIGHT, 1) * _HEIGHT
    for first in range(0, len(codes), height):
        piece = slice(first, first + height)
        torch.mm(x, dequantized(codes[piece], scales[piece], x.dtype).T, out=out[:, piece])
    return out


def dequantized(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights [n, k], computed in float32 and rounded to ``dtype``; arguments as of ``int4_product``."""
    if codes.device.type == "cuda":
        from evospec.kernels.triton.int4 import dequantized_triton

        return dequantized_triton(codes, scales, dtype)
    octets = codes.view(*scales.shape[:2], BLOCK // 2)
    values = torch.cat((octets & 15, octets >> 4), dim=2) * scales[..., :1].float() + scales[..., 1:].float()
    return values.to(dtype).flatten(1)
