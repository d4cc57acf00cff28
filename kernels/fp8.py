"""Products of numbers of 8 bits, FP8 (e4m3): weights with a scale for each row, activations with one for each token."""

from __future__ import annotations

import torch

LARGEST = 448.0
"""Number of this format."""
SMALLEST_SCALE = 1e-12
"""Also of a row of zeros."""
MULTIPLE = 16
"""Of what rows and columns of a weight have to be."""


def fp8_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (weight * scales)^T, of x rounded to FP8.

    Args:
        x: [T, k] bfloat16.
        weight: [n, k] float8_e4m3fn.
        scales: [n] float32, of its rows.

    Returns:
        [T, n] bfloat16.
    """
    codes, of_rows = quantize_rows(x)
    return torch._scaled_mm(codes, weight.t(), scale_a=of_rows, scale_b=scales[None], out_dtype=x.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, k] float8_e4m3fn and scales [T, 1] float32, whose products are nearest to x [T, k]."""
    if x.device.type == "cuda":
        from evospec.kernels.triton.fp8 import quantize_rows_triton

        return quantize_rows_triton(x, LARGEST, SMALLEST_SCALE)
    wide = x.float()
    scales = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (wide / scales).to(torch.float8_e4m3fn), scales
