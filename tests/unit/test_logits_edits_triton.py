"""The Triton kernels that edit logits, in Triton's interpreter where there is no GPU, against what a CPU does."""

from __future__ import annotations

import os
from array import array

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from evospec.kernels.kept_thresholds import unpack_bits
from evospec.kernels.logits_edits import edit_on_gpu
from evospec.kernels.penalties import SeenTokens, penalize, sparse_edits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 1500


def test_the_same_logits() -> None:
    """Penalties on more tokens than a block has, then a mask; what is no number is told of."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4, VOCAB)).astype(np.float32) * 3)
    logits[2, 7], logits[3, 8] = torch.inf, torch.nan
    seen = SeenTokens()
    for row, count in ((0, 1400), (1, 0), (3, 5)):
        tokens, counts = rng.permutation(np.arange(10, VOCAB))[:count], rng.integers(0, 3, count)
        seen.add(row, (1.3, 0.5, -0.25), count // 2, *(array("q", values.tolist()) for values in (tokens, counts)))
    allowed = rng.integers(-(2**31), 2**31, (4, -(-VOCAB // 32))).astype(np.int32)
    ours, expected = logits.to(DEVICE), logits.clone()
    edit_on_gpu(ours, [sparse_edits(seen)], allowed)
    penalize(expected, seen)
    is_kept = unpack_bits(torch.from_numpy(allowed), VOCAB) | ~(expected < torch.inf)
    expected[~is_kept] = -torch.inf
    assert torch.equal(ours.cpu().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
