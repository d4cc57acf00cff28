"""Repetition, presence and frequency penalties on tokens that were seen before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels import native_sampling

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SeenTokens:
    """The distinct tokens before each of R rows of logits, N in all.

    Attributes:
        rows: [R] the rows.
        ends: [R] where the tokens of each row end.
        num_prompt: [R] how many of them, the first, are the prompt's, which ``repetition`` is about too.
        penalties: [R, 3] float64: repetition, presence, frequency.
        token_ids: [N] the tokens, row after row; all below V (not checked).
        counts: [N] how often each occurs in the output; 0 is not seen, unless it is one of the prompt's.
    """

    rows: IntArray
    ends: IntArray
    num_prompt: IntArray
    penalties: npt.NDArray[np.float64]
    token_ids: IntArray
    counts: IntArray


def penalize(logits: torch.Tensor, seen: SeenTokens) -> torch.Tensor:
    """Change, in place, the logits of tokens that were seen.

    Positive ones are divided by the repetition penalty and others multiplied; then what the output holds loses the
    presence penalty once, and the frequency penalty for each occurrence.

    Args:
        logits: [L, V] float32, contiguous.
        seen: which tokens of which rows.

    Returns:
        [N] float32, what was there before, for ``put_back``.
    """
    if native_sampling.can_take(logits):
        return native_sampling.penalize(logits, seen)
    return penalize_reference(logits, seen)


def put_back(logits: torch.Tensor, seen: SeenTokens, before: torch.Tensor) -> None:
    """Undo ``penalize``."""
    if native_sampling.can_take(logits):
        native_sampling.put_back(logits, seen, before)
    else:
        logits[_index(seen, logits.device)] = before


def penalize_reference(logits: torch.Tensor, seen: SeenTokens) -> torch.Tensor:
    """As ``penalize``."""
    sizes = np.diff(seen.ends, prepend=0)
    is_prompt = np.arange(len(seen.counts)) - np.repeat(seen.ends - sizes, sizes) < np.repeat(seen.num_prompt, sizes)
    repetition, presence, frequency = np.repeat(seen.penalties, sizes, axis=0).T
    factors = np.where(is_prompt | (seen.counts > 0), repetition, 1.0)
    subtracted = presence * (seen.counts > 0) + frequency * seen.counts
    factor, less = (torch.from_numpy(a.astype(np.float32)).to(logits.device) for a in (factors, subtracted))
    index = _index(seen, logits.device)
    before = logits[index]
    logits[index] = torch.where(before > 0, before / factor, before * factor) - less
    return before


def _index(seen: SeenTokens, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each token."""
    rows = np.repeat(seen.rows, np.diff(seen.ends, prepend=0))
    return torch.from_numpy(rows).to(device), torch.from_numpy(seen.token_ids).to(device)
