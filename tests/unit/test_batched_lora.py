"""Adapters of a batch's rows: torch operations, the compiled kernel and the Triton kernel against the reference.

Triton's interpreter takes the place of a GPU where there is none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.kernels import native
from evospec.kernels.batched_lora import LoraPart, LoraRows, NativeLora, batched_lora

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batched_lora_reference(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor
) -> None:
    """The specification of ``batched_lora``: a row at a time, in float32."""
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            gain = (a[slot].float() @ x[row].float()) @ b[slot].float()
            out[row] = (out[row].float() + gain).to(out.dtype)


@dataclass(frozen=True)
class Shape:
    rows: int
    slots: int
    rank: int
    inputs: int
    outputs: int
    seed: int


def shapes(inputs: st.SearchStrategy[int], outputs: st.SearchStrategy[int]) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        rows=st.integers(1, 12),
        slots=st.integers(1, 4),
        rank=st.integers(1, 70),
        inputs=inputs,
        outputs=outputs,
        seed=st.integers(0, 2**31),
    )


class Case:
    """Rows of all slots, and some of none. ``out`` is a range of columns of a wider product."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(shape.seed)

        def values(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.x = values(shape.rows, shape.inputs)
        self.a = values(shape.slots, shape.rank, shape.inputs) / shape.inputs**0.5
        self.b = values(shape.slots, shape.rank, shape.outputs) / shape.rank**0.5
        self.slots = torch.randint(-1, shape.slots, (shape.rows,), generator=generator, dtype=torch.int32).to(device)
        self.product = values(shape.rows, shape.outputs + 5).float()
        self.columns = slice(3, 3 + shape.outputs)

    def expected(self) -> torch.Tensor:
        product = self.product.clone()
        batched_lora_reference(product[:, self.columns], self.x, self.a, self.b, self.slots)
        is_base = self.slots < 0
        assert torch.equal(product[is_base], self.product[is_base])
        return product


@settings(max_examples=80)
@given(shapes(st.integers(1, 200), st.integers(1, 150)))
def test_torch(shape: Shape) -> None:
    case = Case(shape, torch.float32, torch.device("cpu"))
    product = case.product.clone()
    batched_lora(product[:, case.columns], case.x, case.a, case.b, case.slots)
    torch.testing.assert_close(product, case.expected(), rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(shapes(st.integers(1, 200), st.integers(1, 150)))
def test_triton(shape: Shape) -> None:
    """In small pieces, so that there are more of them: several for a program, and several programs for a row."""
    from evospec.kernels.triton import batched_lora as kernel

    case = Case(shape, torch.float32, DEVICE)
    product = case.product.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_NUMBERS", 16 * (1 << (shape.rank - 1).bit_length()))
        patch.setattr(kernel, "_SHARE", 64)
        kernel.batched_lora_triton(product[:, case.columns], case.x, case.a, case.b, case.slots)
    torch.testing.assert_close(product, case.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))
@settings(max_examples=80)
@given(shapes(st.integers(1, 8).map(lambda n: 32 * n), st.integers(1, 9).map(lambda n: 16 * n)))
def test_compiled(shape: Shape) -> None:
    case = Case(shape, torch.bfloat16, torch.device("cpu"))
    product = case.product.clone()
    rows = LoraRows(case.slots, [LoraPart(case.columns.start, case.columns.stop, case.a, case.b)])
    NativeLora(rows).add_to(product, case.x, native.Team(2))
    torch.testing.assert_close(product, case.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))
@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"), [(40, 16, "multiple of 32"), (32, 20, "multiple of 16 outputs")]
)
def test_the_compiled_kernel_refuses_what_it_cannot_compute(inputs: int, outputs: int, reason: str) -> None:
    a, b = torch.zeros(1, 8, inputs).bfloat16(), torch.zeros(1, 8, outputs).bfloat16()
    with pytest.raises(ValueError, match=reason):
        NativeLora(LoraRows(torch.zeros(1, dtype=torch.int32), [LoraPart(0, outputs, a, b)]))
