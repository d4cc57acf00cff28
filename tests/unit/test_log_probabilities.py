"""Log-probabilities of some rows against torch, on every path."""

from __future__ import annotations

import pytest
import torch

from evospec.kernels import native, native_sampling
from evospec.kernels.log_probabilities import log_probabilities
from evospec.kernels.native import Team

ROWS, TOKENS = [8, 2, 0, 2, 5, 3], [4999, 0, 7, 3, 7, 1]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("k", [0, 1, 5, 6000])
def test_of_tokens_and_of_the_most_likely(k: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native_sampling, "can_take", lambda _: False)
    logits = torch.randn(9, 5000, generator=torch.Generator().manual_seed(k)) * 4
    logits[2, 1:] = logits[3] = -torch.inf  # of nothing that may be, no probability is a number
    expected = logits.double().log_softmax(dim=1)[ROWS]
    found = log_probabilities(logits, ROWS, TOKENS, k)
    chosen = expected.gather(1, torch.tensor(TOKENS).unsqueeze(1)).flatten()
    torch.testing.assert_close(
        torch.tensor(found.chosen, dtype=torch.float64), chosen, rtol=1e-6, atol=1e-5, equal_nan=True
    )
    for row, token_ids, values in zip(expected, found.top_token_ids, found.top, strict=True):
        largest = row.sort(descending=True, stable=True)
        assert token_ids == largest.indices[:k].tolist()
        found_values = torch.tensor(values).double()
        torch.testing.assert_close(found_values, largest.values[:k], rtol=1e-6, atol=1e-5, equal_nan=True)


def test_threads_change_nothing() -> None:
    if native.unsupported_reason() is not None:
        pytest.skip("no compiled kernels here")
    logits = torch.randn(9, 50_000, generator=torch.Generator().manual_seed(1))
    assert log_probabilities(logits, ROWS, TOKENS, 3) == log_probabilities(logits, ROWS, TOKENS, 3, Team(2))
