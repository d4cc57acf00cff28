"""Products of FP8: what is rounded, and that nothing else is."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from evospec.kernels.fp8 import LARGEST, SMALLEST_SCALE, fp8_product, quantize_rows
from evospec.kernels.triton.fp8 import quantize_rows_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def activations(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different sizes, one of them zeros."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (x * torch.logspace(-6, 3, rows)[:, None]).bfloat16().index_fill(0, torch.tensor([1]), 0.0)


def test_each_row_has_a_scale_of_its_own() -> None:
    """A code has 4 bits: it is within 1/16 of its number, or within the smallest step, 2^-9 scales."""
    x = activations(5, 96)
    codes, scales = quantize_rows(x)
    values = codes.float() * scales
    assert bool(((values - x).abs() <= torch.maximum(x.abs() / 16, scales * 2**-9)).all())
    assert torch.equal(codes.float().abs().amax(1) == 448, torch.arange(5) != 1)
    for row in range(5):
        assert torch.equal(quantize_rows(x[row : row + 1])[0].float(), codes[row : row + 1].float())


@pytest.mark.parametrize("columns", [96, 2100])
def test_the_kernel_scales_rows_the_same(columns: int) -> None:
    """Before it rounds them, as the interpreter rounds otherwise than GPUs: a carry is lost."""
    x = activations(5, columns)
    codes, scales = quantize_rows_triton(x.to(DEVICE), LARGEST, SMALLEST_SCALE, torch.float32)
    of_rows = quantize_rows(x)[1]
    torch.testing.assert_close(scales.cpu(), of_rows, rtol=1e-6, atol=0)
    torch.testing.assert_close(codes.cpu(), x.float() / of_rows, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_gives_the_same_codes() -> None:
    """But for a few where a division ends on the other side of the middle between two."""
    x = activations(5, 2100)
    codes, expected = (
        quantize_rows_triton(x.to(DEVICE), LARGEST, SMALLEST_SCALE)[0].cpu().float(),
        quantize_rows(x)[0].float(),
    )
    assert (codes != expected).float().mean() < 0.001


def test_a_product_is_that_of_the_rounded_activations() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = activations(5, 96), torch.randn(48, 96, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(48, generator=generator) + 0.1
    codes, of_rows = quantize_rows(x)
    expected = (codes.double() * of_rows) @ (weight.double() * scales[:, None]).T
    product = fp8_product(x.to(DEVICE), weight.to(DEVICE), scales.to(DEVICE)).cpu()
    assert product.dtype == torch.bfloat16
    largest = expected.abs().amax(1, keepdim=True)
    assert bool(((product - expected).abs() <= 2**-8 * largest).all())
