"""Low-rank adapters, each row of a batch its own (LoRA, arXiv 2106.09685; in one batch: Punica, arXiv 2310.18547).

All adapters of one matrix lie in two tensors, ``a`` [slots, rank, inputs] and ``b`` [slots, rank, outputs]. A row with
slot s gains (x a_s^T) b_s. A row with slot -1 gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

LoraMatrix = Literal["qkv", "output", "down"]
"""The matrices of a draft that adapters change; q, k and v are one."""


@dataclass(frozen=True)
class LoraPart:
    """The adapters of columns ``start`` .. ``end`` - 1 of a matrix's product.

    ``a`` [slots, rank, inputs] and ``b`` [slots, rank, end - start], contiguous; they may be overwritten between calls.
    """

    start: int
    end: int
    a: torch.Tensor
    b: torch.Tensor
    matrix: LoraMatrix = "qkv"


@dataclass(frozen=True)
class LoraRows:
    """What the rows of a batch gain: ``slots`` [N] int32, each row's adapter or -1, and the parts that are adapted."""

    slots: torch.Tensor
    parts: Sequence[LoraPart]

    def add_to(self, out: torch.Tensor, x: torch.Tensor, matrix: LoraMatrix) -> None:
        """Add to the matrix's product ``out`` [N, outputs] of ``x`` [N, inputs], in place."""
        for part in self.parts:
            if part.matrix == matrix:
                batched_lora(out[:, part.start : part.end], x, part.a, part.b, self.slots)

    def of(self, wanted: torch.Tensor) -> LoraRows:
        """The same for some of the rows."""
        return LoraRows(self.slots[wanted], self.parts)


def batched_lora(out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor) -> None:
    """Add to each row of ``out`` what its adapter makes of the row of ``x``, in place.

    The compiled decoder does the same inside its layer (kernels/csrc/lora.cpp).

    Args:
        out: [N, outputs]; rows may lie apart.
        x: [N, inputs], of the dtype of ``out``.
        a: [slots, rank, inputs], of any floating-point dtype.
        b: [slots, rank, outputs], of the same.
        slots: [N] int32, -1: none.
    """
    if out.device.type == "cuda":
        from kernels.triton.batched_lora import batched_lora_triton

        batched_lora_triton(out, x, a, b, slots)
        return
    for slot in set(slots.tolist()) - {-1}:
        rows = (slots == slot).nonzero().squeeze(1)
        out[rows] += (x[rows] @ a[slot].to(x.dtype).T) @ b[slot].to(x.dtype)
