"""The largest logits by the Triton kernel, in Triton's interpreter where there is no GPU, against a sort."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from evospec.kernels.topk import decode_sort_keys
from evospec.kernels.triton.topk import largest_keys_triton
from tests.sorted_rows import topk_rows_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("columns", "k", "rows"), [(2500, 10, [3, 0, 3]), (7, 7, None), (1100, 1, None)])
def test_the_same_tokens(columns: int, k: int, rows: list[int] | None) -> None:
    """Of numbers of which many are equal, 0 and -0 among them, and some infinite."""
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(4, columns, generator=generator).mul_(3).round_().mul_(0.5)
    logits[0, 3], logits[1, 2:] = torch.inf, -torch.inf
    places = None if rows is None else torch.tensor(rows, device=DEVICE)
    values, found = decode_sort_keys(largest_keys_triton(logits.to(DEVICE), k, places).cpu())
    expected = topk_rows_reference(logits if rows is None else logits[rows], k)
    assert torch.equal(values, expected[0])
    assert torch.equal(found, expected[1])
