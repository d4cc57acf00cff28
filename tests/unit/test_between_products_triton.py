"""What is between a layer's products, by the Triton kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from typing import get_args

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from evospec.engine.models.config import Activation
from evospec.kernels.between_products import (
    SWIGLU_LIMIT,
    SWIGLU_SLOPE,
    add_and_norm,
    add_normed,
    gated,
    prepare_heads,
    rms_norm,
)
from evospec.kernels.heads import HeadNorms, Heads, Rotation
from evospec.kernels.triton.between_products import add_triton, gated_triton, norm_triton, prepare_heads_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""In bfloat16 a number may fall to the other side: 2^-8 of itself, up to 4 here."""
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def compare(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(ours.cpu(), expected, rtol=tolerance, atol=tolerance)


@dtypes
@pytest.mark.parametrize("shape", [(3, 96), (2, 3, 40)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of rows, and of parts that have weights of their own."""
    x, weight = randn(*shape, dtype=dtype), randn(*shape[1:])
    compare(norm_triton(x.to(DEVICE), weight.to(DEVICE), 1e-5), rms_norm(x, weight, 1e-5))


@dtypes
@pytest.mark.parametrize("norms_added", [False, True])
def test_sums_and_their_norms(norms_added: bool, dtype: torch.dtype) -> None:
    residual, added = randn(3, 72, dtype=dtype), 3 * randn(3, 72, dtype=dtype).flip(0)
    norm, weight = randn(72).flip(0) if norms_added else None, randn(72)
    of_device = None if norm is None else norm.to(DEVICE)
    ours = add_triton(residual.to(DEVICE), added.to(DEVICE), of_device, weight.to(DEVICE), 1e-5)
    for one, expected in zip(ours, add_and_norm(residual, added, norm, weight, 1e-5), strict=True):
        compare(one, expected)
    total = add_triton(residual.to(DEVICE), added.to(DEVICE), of_device, None, 1e-5)[0]
    compare(total, add_normed(residual, added, norm, 1e-5))


@dtypes
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("rotary", [None, 24, 48])
def test_heads(rotary: int | None, has_norms: bool, dtype: torch.dtype) -> None:
    """Some, all or none of a head's numbers turn."""
    shape, positions = Heads(4, 2, 48), torch.tensor([0, 7, 3])
    product = randn(3, 8 * 48, dtype=dtype)
    norms = HeadNorms(randn(48), randn(48).flip(0), 1e-5) if has_norms else None
    moved = None if norms is None else HeadNorms(norms.query.to(DEVICE), norms.key.to(DEVICE), norms.eps)
    rotation = on_device = None
    if rotary is not None:
        angles = randn(9, rotary // 2)
        rotation = Rotation(torch.cat((angles.cos(), angles.sin()), dim=1), positions)
        on_device = Rotation(*(tensor.to(DEVICE) for tensor in rotation))
    ours = prepare_heads_triton(product.to(DEVICE), shape, moved, on_device)
    expected = prepare_heads(product, shape, norms, rotation)
    for one, of_torch in zip(ours, expected, strict=False):
        compare(one, of_torch)
    assert torch.equal(expected[2], product.view(3, 8, 48)[:, 6:])


@dtypes
@pytest.mark.parametrize("activation", get_args(Activation))
def test_gates(activation: Activation, dtype: torch.dtype) -> None:
    product = 4 * randn(3, 2 * 1100, dtype=dtype)
    compare(gated_triton(product.to(DEVICE), activation, SWIGLU_SLOPE, SWIGLU_LIMIT), gated(product, activation))
