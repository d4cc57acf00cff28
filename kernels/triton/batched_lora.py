"""``kernels.batched_lora`` as a Triton kernel: what is between a row's two products leaves no program."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_NUMBERS = 8192  # of a matrix, at a time
_SHARE = 2048  # output columns of a program: for fewer the first product would be computed too often
_STAGES = tl.constexpr(3)  # loads under way while numbers are added up; without products Triton wants to be told


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
    SHARE: tl.constexpr,
):
    """Each program: ``SHARE`` columns of a row, for which it computes the first product anew.

    ``INPUTS`` and ``OUTPUTS``: columns at a time; ``RANK``: the rank, rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        r = tl.arange(0, RANK)
        inner = tl.zeros((RANK,), dtype=tl.float32)
        for start in tl.range(0, num_inputs, INPUTS, num_stages=_STAGES):
            k = start + tl.arange(0, INPUTS)
            value = tl.load(x + row * x_stride + k, mask=k < num_inputs, other=0.0).to(tl.float32)
            is_a = (r[:, None] < rank) & (k[None, :] < num_inputs)
            weight = tl.load(a + (slot * rank + r[:, None]) * num_inputs + k[None, :], mask=is_a, other=0.0)
            inner += tl.sum(weight.to(tl.float32) * value[None, :], axis=1)
        first = tl.program_id(1) * SHARE
        for start in tl.range(first, min(first + SHARE, num_outputs), OUTPUTS, num_stages=_STAGES):
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
    (rank, num_inputs), num_outputs = a.shape[1:], b.shape[2]
    height = triton.next_power_of_2(rank)
    columns = min(_NUMBERS // height, _SHARE)
    _lora_kernel[(len(x), triton.cdiv(num_outputs, _SHARE))](
        *(out, x, a, b, slots, out.stride(0), x.stride(0), num_inputs, num_outputs, rank),
        **{"RANK": height, "INPUTS": columns, "OUTPUTS": columns, "SHARE": _SHARE},
    )
