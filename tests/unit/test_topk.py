"""The largest logits of rows, on every path, against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.kernels.topk import topk_rows, topk_rows_by_keys
from tests.sorted_rows import topk_rows_reference

_VALUES = [0.0, -0.0, 1.5, -1.5, 1e-40, -1e-40, 3e38, -3e38, float("inf"), float("-inf")]


@settings(max_examples=200)
@given(row=st.lists(st.sampled_from(_VALUES), min_size=1, max_size=12), k=st.integers(1, 5), with_ids=st.booleans())
def test_equals_come_in_order_of_their_columns(row: list[float], k: int, with_ids: bool) -> None:
    logits = torch.tensor([row, row[::-1]])
    ids = torch.arange(100, 100 + logits.shape[1]).flip(0) if with_ids else None
    expected = topk_rows_reference(logits, k, ids)
    for compute in (topk_rows_by_keys, topk_rows):
        values, chosen = compute(logits, k, ids)
        assert values.tolist() == expected[0].tolist()
        assert chosen.tolist() == expected[1].tolist()


def test_some_rows() -> None:
    logits = torch.randn(9, 500).half().float()
    expected = topk_rows_reference(logits[[7, 2, 2]], 20)
    assert all(map(torch.equal, topk_rows(logits, 20, rows=[7, 2, 2]), expected))


@pytest.mark.parametrize("rows", [1, 65])
def test_wide_rows(rows: int) -> None:
    logits = torch.randn(rows, 5000).half().float()  # with ties
    expected = topk_rows_reference(logits, 300)
    for compute in (topk_rows_by_keys, topk_rows):
        assert all(map(torch.equal, compute(logits, 300), expected))
