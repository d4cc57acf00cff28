"""The largest logits of rows, on every path, against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native_sampling
from kernels.topk import topk_rows, topk_rows_by_keys, topk_rows_reference, topk_with_log_totals

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


@pytest.mark.parametrize("rows", [1, 65])
def test_wide_rows(rows: int) -> None:
    logits = torch.randn(rows, 5000).half().float()  # with ties
    expected = topk_rows_reference(logits, 300)
    for compute in (topk_rows_by_keys, topk_rows):
        assert all(map(torch.equal, compute(logits, 300), expected))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("k", [0, 1, 5, 6000])
def test_log_totals_come_with_the_largest(k: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native_sampling, "can_take", lambda _: False)
    logits = torch.randn(9, 5000, generator=torch.Generator().manual_seed(k)) * 4
    logits[2, 1:] = logits[3] = -torch.inf
    values, columns, log_totals = topk_with_log_totals(logits, k)
    assert all(map(torch.equal, (values, columns), topk_rows_reference(logits, k)))
    torch.testing.assert_close(log_totals, logits.double().logsumexp(dim=1), rtol=1e-6, atol=1e-6)
