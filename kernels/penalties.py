"""Repetition, presence and frequency penalties on tokens that were seen before."""

from __future__ import annotations

import ctypes
from array import array
from typing import TypeAlias

import numpy as np
import torch

from evospec.kernels import native_sampling
from evospec.kernels.logits_edits import SparseEdits
from evospec.kernels.native import address, integers, load_library, pointers

IntArray: TypeAlias = "array[int]"


class _SeenTokens(ctypes.Structure):
    _fields_ = (
        *pointers("rows", "ends", "num_prompt", "penalties", "token_ids", "counts"),
        *integers("num_rows"),
    )


class SeenTokens:
    """The distinct tokens before each of some rows of logits. (Python's arrays: small ones cost less than NumPy's.)

    Attributes:
        rows: [R] the rows.
        ends: [R] where the tokens of each row end.
        num_prompt: [R] how many of them, the first, are the prompt's, which the repetition penalty is about too.
        penalties: [R, 3] float64: repetition, presence, frequency.
        token_ids: [N] the tokens, row after row; all below V (not checked).
        counts: [N] how often each occurs in the output; 0 is not seen, unless it is one of the prompt's.
    """

    def __init__(self) -> None:
        self.rows: IntArray = array("q")
        self.ends: IntArray = array("q")
        self.num_prompt: IntArray = array("q")
        self.penalties = array("d")
        self.token_ids: IntArray = array("q")
        self.counts: IntArray = array("q")

    def __bool__(self) -> bool:
        return bool(self.rows)

    def add(
        self,
        row: int,
        penalties: tuple[float, float, float],
        num_prompt: int,
        token_ids: IntArray,
        counts: IntArray,
    ) -> None:
        """One row's, as they are now."""
        self.rows.append(row)
        self.num_prompt.append(num_prompt)
        self.penalties.extend(penalties)
        self.token_ids += token_ids
        self.counts += counts
        self.ends.append(len(self.token_ids))


def penalize(logits: torch.Tensor, seen: SeenTokens) -> torch.Tensor:
    """Change, in place, the logits of tokens that were seen.

    Positive ones are divided by the repetition penalty and others multiplied; then what the output holds loses the
    presence penalty once, and the frequency penalty for each occurrence.

    Args:
        logits: [L, V] float32 on the CPU, contiguous.
        seen: which tokens of which rows.

    Returns:
        [N] float32, what was there before, for ``put_back``.
    """
    if native_sampling.can_take(logits):
        before = torch.empty(len(seen.token_ids))
        load_library().evo_penalize(address(logits), logits.stride(0), _struct(seen), address(before))
        return before
    edits, index = sparse_edits(seen), _index(seen)
    factors, addends = torch.from_numpy(edits.factors), torch.from_numpy(edits.addends)
    before = logits[index]
    logits[index] = torch.where(before > 0, before / factors, before * factors) + addends
    return before


def sparse_edits(seen: SeenTokens) -> SparseEdits:
    """What ``penalize`` does."""
    ends, counts = np.array(seen.ends), np.array(seen.counts)
    sizes = np.diff(ends, prepend=0)
    is_prompt = np.arange(len(counts)) - np.repeat(ends - sizes, sizes) < np.repeat(seen.num_prompt, sizes)
    repetition, presence, frequency = np.repeat(np.array(seen.penalties).reshape(-1, 3), sizes, axis=0).T
    factors = np.where(is_prompt | (counts > 0), repetition, 1.0).astype(np.float32)
    addends = -(presence * (counts > 0) + frequency * counts).astype(np.float32)
    return SparseEdits(np.array(seen.rows), ends, np.array(seen.token_ids), factors, addends)


def put_back(logits: torch.Tensor, seen: SeenTokens, before: torch.Tensor) -> None:
    """Undo ``penalize``."""
    if native_sampling.can_take(logits):
        load_library().evo_put_back(address(logits), logits.stride(0), _struct(seen), address(before))
    else:
        logits[_index(seen)] = before


def _struct(seen: SeenTokens) -> ctypes._CArgObject:
    """As the compiled kernels take them."""
    arrays = (seen.rows, seen.ends, seen.num_prompt, seen.penalties, seen.token_ids, seen.counts)
    return ctypes.byref(_SeenTokens(*(one.buffer_info()[0] for one in arrays), len(seen.rows)))


def _index(seen: SeenTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each token."""
    rows = np.repeat(seen.rows, np.diff(seen.ends, prepend=0))
    return torch.from_numpy(rows), torch.from_numpy(np.array(seen.token_ids))
