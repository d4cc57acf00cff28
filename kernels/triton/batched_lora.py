"""``kernels.batched_lora`` as a Triton kernel: one program a row, and none of a row's numbers leaves it in between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _lora_kernel(
    out,
    x,
    a,
    b,
    slots,
    out_stride,
    x_stride,
    num_inputs,
    num_outputs,
    rank,
    RANK: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """``INPUTS`` and ``OUTPUTS``: columns at a time; ``RANK``: the rank, rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        r = tl.arange(0, RANK)
        inner = tl.zeros((RANK,), dtype=tl.float32)
        for start in range(0, num_inputs, INPUTS):
            k = start + tl.arange(0, INPUTS)
            value = tl.load(x + row * x_stride + k, mask=k < num_inputs, other=0.0).to(tl.float32)
            is_a = (r[:, None] < rank) & (k[None, :] < num_inputs)
            weight = tl.load(a + (slot * rank + r[:, None]) * num_inputs + k[None, :], mask=is_a, other=0.0)
            inner += tl.sum(weight.to(tl.float32) * value[None, :], axis=1)
        for start in range(0, num_outputs, OUTPUTS):
            n = start + tl.arange(0, OUTPUTS)
            is_b = (r[:, None] < rank) & (n[None, :] < num_outputs)
            weight = tl.load(b + (slot * rank + r[:, None]) * num_outputs + n[None, :], mask=is_b, other=0.0)
            gain = tl.sum(weight.to(tl.float32) * inner[:, None], axis=0)
            place = out + row * out_stride + n
            before = tl.load(place, mask=n < num_outputs, other=0.0).to(tl.float32)
            tl.store(place, (before + gain).to(out.dtype.element_ty), mask=n < num_outputs)


def batched_lora_triton(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor
) -> None:
    """As ``kernels.batched_lora.batched_lora``; ``a`` and ``b`` contiguous, ``out`` and ``x`` by row."""
    rank, num_inputs = a.shape[1:]
    _lora_kernel[(len(x),)](
        *(out, x, a, b, slots, out.stride(0), x.stride(0), num_inputs, b.shape[2], rank),
        RANK=triton.next_power_of_2(rank),
        INPUTS=64,
        OUTPUTS=64,
    )
