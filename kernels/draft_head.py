"""A draft's candidates: the largest logits of every row over a shared core of the head and each session's own tail.

The *core* is one contiguous slab of head rows. A *tail* is a slab of a fixed number of slots, each empty or the head
row of one token; a batch's rows name their tail by number. Head rows are copied when a tail changes, never when it is
used, and no shape ever changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from kernels import native_sampling
from kernels.native import Team, address, integers, load_library, pointers
from kernels.native_sampling import logit_rows, team_handle
from kernels.topk import topk_rows, topk_rows_by_keys
from kernels.upload import upload

EMPTY = -1
"""Token id of an empty slot."""


class TailSlabsStruct(ctypes.Structure):
    _fields_ = (*pointers("rows", "token_ids"), *integers("slots", "hidden"))


class _TailQueries(ctypes.Structure):
    _fields_ = pointers("hidden", "slabs")


@dataclass(frozen=True)
class Core:
    """The head rows that all sessions share."""

    project: Callable[[torch.Tensor], torch.Tensor]
    """[N, hidden] → [N, K] float32, maybe valid until the next call only; in whatever form the rows are stored"""
    token_ids: torch.Tensor | None = None
    """[K] int32, the tokens of the rows (None: 0 .. K - 1)"""
    rows: torch.Tensor | None = None
    """[K, hidden], where they are floating-point numbers as they are: for the Triton kernel"""


@dataclass(frozen=True)
class HeadRows:
    """All rows of a head."""

    rows: torch.Tensor
    """[n, hidden]"""
    row_of: torch.Tensor | None = None
    """[vocab] int32, the row of each token; -1: it has none (None: the row of its number)"""


class TailSlabs:
    """Memory of the tails, all of them empty at first.

    Args:
        head_rows: [n] int32 token ids → [n, hidden] their rows of the head, floating-point.
        num_slabs: how many tails.
        slots: tokens in each.
        hidden: width of a row.
        dtype: of the rows; bfloat16 for the compiled kernels.
        device: where the hidden states will be.
    """

    def __init__(
        self,
        head_rows: Callable[[torch.Tensor], torch.Tensor],
        num_slabs: int,
        slots: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._head_rows = head_rows
        self.rows = torch.zeros(num_slabs, slots, hidden, dtype=dtype, device=device)
        """[num_slabs, slots, hidden]; an empty slot may hold anything finite"""
        self.token_ids = torch.full((num_slabs, slots), EMPTY, dtype=torch.int32, device=device)
        """[num_slabs, slots]"""

    @property
    def struct(self) -> TailSlabsStruct:
        """As the compiled kernels read them; it does not keep them alive."""
        return TailSlabsStruct(self.rows.data_ptr(), self.token_ids.data_ptr(), *self.rows.shape[1:])

    @property
    def slots(self) -> int:
        """Tokens in each slab."""
        return self.rows.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory of all slabs."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.rows, self.token_ids))

    def write(self, slab: int | Sequence[int], slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Put tokens into some slots, in place of what was there.

        No token may be in a slab twice, nor in a slab and the core. ``slab``: of all of them, or one for each.
        """
        typed = (token_ids, np.int32), (slab, np.int64), (slots, np.int64)
        # By arrays: of lists they are made several times faster than tensors.
        ids, of, places = upload(self.rows.device, *(np.array(values, dtype) for values, dtype in typed))
        self.put(of, places, ids, self._head_rows(ids))

    def put(self, slabs: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """As ``write``, of tokens [n] whose ``rows`` [n, hidden] of the head are at hand, on the device."""
        self.rows[slabs, slots] = rows.to(self.rows.dtype)
        self.token_ids[slabs, slots] = token_ids.int()

    def clear(self, slab: int) -> None:
        """Empty all slots of a slab."""
        self.token_ids[slab] = EMPTY


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
        from kernels.triton.draft_head import draft_head_topk_triton

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
