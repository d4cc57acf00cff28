"""Products with matrices of 4 bits: plain torch against GGUF's own numbers, and the Triton kernels against plain torch.

Triton's interpreter takes the place of a GPU where there is none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from evospec.engine.models.int4_blocks import BLOCK_BYTES, codes_of, scales_of
from evospec.kernels import int4
from evospec.kernels.int4 import dequantized, int4_product
from evospec.kernels.triton import int4 as kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
OF_KERNELS = st.sampled_from([torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16])
"""The interpreter multiplies no bfloat16, and does not round to it."""
KINDS = st.sampled_from(list(BLOCK_BYTES))


@dataclass(frozen=True)
class Shape:
    tokens: int
    rows: int
    blocks: int
    seed: int


SHAPES = st.builds(
    Shape, tokens=st.integers(1, 80), rows=st.integers(1, 100), blocks=st.integers(1, 19), seed=st.integers(0, 2**31)
)


class Case:
    """Any codes; scales of both signs, and minima, of very different sizes."""

    def __init__(self, shape: Shape, kind: GGMLQuantizationType, dtype: torch.dtype) -> None:
        random = np.random.default_rng(shape.seed)
        blocks = random.integers(0, 256, (shape.rows, shape.blocks, BLOCK_BYTES[kind]), dtype=np.uint8)
        numbers = random.standard_normal((*blocks.shape[:2], (BLOCK_BYTES[kind] - 16) // 2))
        numbers *= 2.0 ** random.integers(-9, 2, numbers.shape)
        blocks[..., :-16] = numbers.astype(np.float16).view(np.uint8)
        self.weight = torch.from_numpy(dequantize(blocks.reshape(shape.rows, -1), kind)).to(dtype)
        self.codes, self.scales = codes_of(blocks).flatten(1), scales_of(blocks, kind)
        self.x = torch.from_numpy(random.standard_normal((shape.tokens, 32 * shape.blocks))).to(dtype)

    @property
    def on_device(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x.to(DEVICE), self.codes.to(DEVICE), self.scales.to(DEVICE)

    def check(self, product: torch.Tensor) -> None:
        """Against the sums in float64: in 16 bits a result is rounded, by 2^-8 of itself at most."""
        assert product.dtype == self.x.dtype
        expected = F.linear(self.x.double(), self.weight.double())
        sizes = F.linear(self.x.double().abs(), self.weight.double().abs())
        rounding = 2**-8 * expected.abs() if self.x.dtype != torch.float32 else 0.0
        assert bool(((product.cpu() - expected).abs() <= rounding + 1e-5 * sizes).all())


@given(SHAPES, KINDS, DTYPES)
def test_weights_are_ggufs(shape: Shape, kind: GGMLQuantizationType, dtype: torch.dtype) -> None:
    case = Case(shape, kind, dtype)
    assert torch.equal(dequantized(case.codes, case.scales, dtype), case.weight)


@settings(max_examples=30)
@given(SHAPES, KINDS, DTYPES)
def test_products_in_pieces(shape: Shape, kind: GGMLQuantizationType, dtype: torch.dtype) -> None:
    case = Case(shape, kind, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int4, "PIECE", 32 * case.x.shape[1])
        patch.setattr(int4, "_HEIGHT", 16)
        case.check(int4_product(case.x, case.codes, case.scales))


@settings(max_examples=20)
@given(SHAPES, KINDS, OF_KERNELS)
def test_the_kernels_weights_are_the_same(shape: Shape, kind: GGMLQuantizationType, dtype: torch.dtype) -> None:
    case = Case(shape, kind, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_EXPANDED", 64)
        assert torch.equal(kernel.dequantized_triton(*case.on_device[1:], dtype).cpu(), case.weight)


@settings(max_examples=20)
@given(SHAPES, KINDS, OF_KERNELS, st.sampled_from([0, 8192]))
def test_the_kernels_products(shape: Shape, kind: GGMLQuantizationType, dtype: torch.dtype, few_rows: int) -> None:
    """With the programs of few and of many rows."""
    case = Case(shape, kind, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_FEW_ROWS", few_rows)
        case.check(kernel.int4_product_triton(*case.on_device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [4096, 28672])
def test_a_tokens_product_is_that_of_the_token_alone(rows: int) -> None:
    """Bit for bit: the interpreter, whose products are numpy's, cannot tell."""
    x, codes, scales = Case(Shape(64, rows, 128, 0), GGMLQuantizationType.Q4_1, torch.bfloat16).on_device
    product = int4_product(x, codes, scales)
    for count in (1, 17, 63):
        assert torch.equal(int4_product(x[-count:], codes, scales), product[-count:])
