"""The rows of a target's head over which a draft chooses: a core that all sessions share, and each session's own tail.

The *core* is one contiguous slab of head rows. A *tail* is a slab of a fixed number of slots, each empty or the head
row of one token. Head rows are copied when a tail changes, never when it is used, and no shape ever changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from evospec.kernels.native import integers, pointers
from evospec.kernels.upload import upload

EMPTY = -1
"""Token id of an empty slot."""


class TailSlabsStruct(ctypes.Structure):
    _fields_ = (*pointers("rows", "token_ids"), *integers("slots", "hidden"))


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


class TailMemory(Protocol):
    """Where the rows of tails are."""

    @property
    def slots(self) -> int:
        """Tokens in each tail."""

    @property
    def num_bytes(self) -> int:
        """Memory of all tails in this process."""

    def write(self, slab: Sequence[int], slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Put tokens into slots, each of the slab named."""

    def clear(self, slab: int) -> None:
        """Empty a slab."""


class TailSlabs:
    """A ``TailMemory`` in this process, all of it empty at first.

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
        return self.rows.shape[1]

    @property
    def num_bytes(self) -> int:
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
        self.token_ids[slab] = EMPTY
