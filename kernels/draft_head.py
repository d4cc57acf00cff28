"""A draft's candidates: the largest logits of every row over a shared core of the head and each session's own tail.

The rows are in ``kernels.head_rows``; a batch's rows name their tail by number.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from evospec.kernels import native_sampling
from evospec.kernels.head_rows import EMPTY, Core, TailSlabs
from evospec.kernels.native import Team, address, load_library, pointers
from evospec.kernels.native_sampling import logit_rows, team_handle
from evospec.kernels.topk import topk_rows, topk_rows_by_keys


class _TailQueries(ctypes.Structure):
    _fields_ = pointers("hidden", "slabs")


def draft_head_topk_reference(
    hidden: torch.Tensor,
    core: Core,
    k: int,
    tails: TailSlabs | None = None,
    slabs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of ``draft_head_topk``."""
    logits = core.project(hidden)
    num_rows, num_columns = logits.shape
    ids = torch.arange(num_columns, device=hidden.device) if core.token_ids is None else core.token_ids
    ids = ids.expand(num_rows, -1)
    if tails is not None:
        assert slabs is not None
        logits = torch.cat((logits, _tail_logits(hidden, tails, slabs)), dim=1)
        ids = torch.cat((ids, tails.token_ids[slabs]), dim=1)
    values, columns = topk_rows_by_keys(logits, k)
    return values, ids.gather(1, columns).int()


def _tail_logits(hidden: torch.Tensor, tails: TailSlabs, slabs: torch.Tensor) -> torch.Tensor:
    """[N, slots] float32, -inf for empty slots; a slab at a time, so that none is copied."""
    logits = torch.empty(len(hidden), tails.slots, device=hidden.device)
    for row, slab in enumerate(slabs.tolist()):
        products = F.linear(hidden[row], tails.rows[slab]).float()
        logits[row] = products.masked_fill(tails.token_ids[slab] == EMPTY, -torch.inf)
    return logits


def draft_head_topk(
    hidden: torch.Tensor,
    core: Core,
    k: int,
    tails: TailSlabs | None = None,
    slabs: torch.Tensor | None = None,
    team: Team | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest logits of each row over the core and the row's tail, in descending order.

    Equal logits keep their order: the core's columns, then the tail's slots.

    Args:
        hidden: [N, hidden], of the dtype that ``core.project`` takes.
        core: K rows of the head.
        k: at least 1; where it exceeds K plus the slots of a tail, all of them are returned.
        tails: S slots for each session (None: no tails).
        slabs: [N] int32, each row's tail; with ``tails``.
        team: threads of the compiled kernels (None: the calling one).

    Returns:
        Logits [N, min(k, K + S)] float32 and token ids, int32. A row with fewer tokens ends in logits of -inf and
        ids of ``EMPTY``.

    Raises:
        ValueError: not every row has a tail, though there are tails.
    """
    if tails is not None and (slabs is None or len(slabs) != len(hidden)):
        raise ValueError("every row needs the number of its tail")
    if hidden.device.type == "cuda" and core.rows is not None:
        from evospec.kernels.triton.draft_head import draft_head_topk_triton

        return draft_head_topk_triton(hidden, core.rows, core.token_ids, k, tails, slabs)
    if tails is None:
        values, token_ids = topk_rows(core.project(hidden), k, core.token_ids, team)
        return values, token_ids.int()
    assert slabs is not None
    if not _can_take_tails(tails.rows, hidden):
        return draft_head_topk_reference(hidden, core, k, tails, slabs)
    return _topk_with_tails(hidden.contiguous(), core, k, tails, slabs.contiguous(), team)


def _topk_with_tails(
    hidden: torch.Tensor, core: Core, k: int, tails: TailSlabs, slabs: torch.Tensor, team: Team | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``draft_head_topk`` by the compiled kernels."""
    logits = core.project(hidden)
    k = min(k, logits.shape[1] + tails.slots)
    values, chosen = torch.empty(len(logits), k), torch.empty(len(logits), k, dtype=torch.int32)
    queries = _TailQueries(hidden.data_ptr(), slabs.data_ptr())
    load_library().evo_draft_top_k(
        *(team_handle(team), logit_rows(logits), address(core.token_ids), ctypes.byref(tails.struct)),
        *(ctypes.byref(queries), k, address(values), address(chosen)),
    )
    return values, chosen


def _can_take_tails(rows: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether the compiled kernels multiply such slabs [num_slabs, slots, hidden] with such hidden states."""
    is_narrow = rows.dtype == hidden.dtype == torch.bfloat16
    return rows.device.type == "cpu" and is_narrow and hidden.shape[1] % 32 == 0 and native_sampling.is_built()
