"""``kernels.draft_head`` as Triton kernels, for heads of floating-point rows.

Each program multiplies a block of head rows and keeps the block's best, by the keys of ``kernels.triton.topk``; the
best of all blocks are merged.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from evospec.kernels.head_rows import TailSlabs
from evospec.kernels.topk import decode_sort_keys
from evospec.kernels.triton.topk import sort_keys

_ROWS = 16  # hidden states of a program, the least that tl.dot takes
_WIDTH = 32  # of hidden, at a time
_SLOTS = 32  # of a tail, for a program: there are few, and many programs read faster than one
_TAIL_WIDTH = 256  # of hidden, at a time, for them
_STAGES = tl.constexpr(3)  # loads under way while numbers are added up; without products Triton wants to be told
_NOTHING = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=["num_rows"])  # only compared with: a batch of another size compiles nothing anew
def _core_kernel(
    hidden,
    head,
    keys,
    num_rows,
    num_columns,
    width,
    key_stride,
    BEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program: the BEST of COLUMNS rows of the head for ROWS hidden states."""
    piece = tl.program_id(0)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        is_x = (row[:, None] < num_rows) & (k[None, :] < width)
        is_w = (column[None, :] < num_columns) & (k[:, None] < width)
        x = tl.load(hidden + row[:, None].to(tl.int64) * width + k[None, :], mask=is_x, other=0.0)
        w = tl.load(head + column[None, :].to(tl.int64) * width + k[:, None], mask=is_w, other=0.0)
        sums += tl.dot(x, w, input_precision="ieee")
    found = tl.where(column[None, :] < num_columns, sort_keys(sums, column[None, :]), _NOTHING)
    place = row[:, None].to(tl.int64) * key_stride + piece * BEST + tl.arange(0, BEST)[None, :]
    tl.store(keys + place, tl.topk(found, BEST), mask=row[:, None] < num_rows)


@triton.jit
def _tail_kernel(
    hidden,
    tail_rows,
    tail_ids,
    slabs,
    keys,
    num_slots,
    first_column,
    width,
    key_stride,
    BEST: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program: the BEST of SLOTS slots of one hidden state's tail."""
    piece = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = piece * SLOTS + tl.arange(0, SLOTS)
    inside = slot < num_slots
    at = tl.load(slabs + row).to(tl.int64) * num_slots + slot
    used = inside & (tl.load(tail_ids + at, mask=inside, other=-1) >= 0)
    sums = tl.zeros((SLOTS,), dtype=tl.float32)
    for start in tl.range(0, width, WIDTH, num_stages=_STAGES):
        k = start + tl.arange(0, WIDTH)
        x = tl.load(hidden + row * width + k, mask=k < width, other=0.0).to(tl.float32)
        is_w = used[:, None] & (k[None, :] < width)
        w = tl.load(tail_rows + at[:, None] * width + k[None, :], mask=is_w, other=0.0).to(tl.float32)
        sums += tl.sum(w * x[None, :], axis=1)
    logits = tl.where(used, sums, float("-inf"))
    found = tl.where(inside, sort_keys(logits, first_column + slot), _NOTHING)
    tl.store(keys + row * key_stride + piece * BEST + tl.arange(0, BEST), tl.topk(found, BEST))


def draft_head_topk_triton(
    hidden: torch.Tensor,
    head: torch.Tensor,
    token_ids: torch.Tensor | None,
    k: int,
    tails: TailSlabs | None = None,
    slabs: torch.Tensor | None = None,
    *,
    block: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.draft_head.draft_head_topk``, for a core of rows ``head`` [K, hidden] and their ``token_ids``.

    ``block``: rows of the core for a program, a power of two from 16 on.
    """
    hidden, head = hidden.contiguous(), head.contiguous()
    num_rows, width = hidden.shape
    num_columns, num_slots = len(head), 0 if tails is None else tails.slots
    k = min(k, num_columns + num_slots)
    # Two at least: before Triton 3.9 `tl.topk` of one does not compile in one dimension.
    wanted = max(2, triton.next_power_of_2(k))
    best, best_of_tail = min(wanted, block), min(wanted, _SLOTS)
    pieces, tail_pieces = triton.cdiv(num_columns, block), triton.cdiv(num_slots, _SLOTS)
    num_keys = pieces * best + tail_pieces * best_of_tail
    keys = torch.empty(num_rows, num_keys, dtype=torch.int64, device=hidden.device)
    _core_kernel[(pieces, triton.cdiv(num_rows, _ROWS))](
        *(hidden, head, keys, num_rows, num_columns, width, keys.stride(0)),
        **{"BEST": best, "ROWS": _ROWS, "COLUMNS": block, "WIDTH": _WIDTH},
    )
    if tails is not None and num_slots > 0:
        assert slabs is not None
        _tail_kernel[(tail_pieces, num_rows)](
            *(hidden, tails.rows, tails.token_ids, slabs, keys[:, pieces * best :]),
            *(num_slots, num_columns, width, keys.stride(0)),
            **{"BEST": best_of_tail, "SLOTS": _SLOTS, "WIDTH": _TAIL_WIDTH},
        )
    values, columns = decode_sort_keys(keys.topk(k, dim=1).values)
    chosen = columns if token_ids is None else token_ids[columns.clamp(max=num_columns - 1)]
    if tails is not None and num_slots > 0:
        slots = (columns - num_columns).clamp(min=0)
        chosen = torch.where(columns < num_columns, chosen, tails.token_ids[slabs].gather(1, slots))
    return values, chosen.int()
