"""Choosing in one compiled call is choosing by tensors, step after step: thresholds, then a Gumbel argmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from evospec.kernels import native, native_sampling
from evospec.kernels.choose_tokens import RowSampling, choose_tokens
from evospec.kernels.native import Team

VOCAB_SIZE = 50_021
GREEDY = (0.0, 5, 0.3, 0.2)
"""Temperature, top_k, top_p, min_p."""
WAYS = [GREEDY, (1.0, 0, 1.0, 0.0), (0.7, 40, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.5, 0, 0.95, 0.0), (0.8, 50, 0.9, 0.05)]

pytestmark = pytest.mark.skipif(native.unsupported_reason() is not None, reason="no compiled kernels here")


def sampling_of(ways: list[tuple[float, int, float, float]]) -> RowSampling:
    temperatures, top_k, top_p, min_p = zip(*ways, strict=True)
    seeds = [2**70 - 3 * row for row in range(len(ways))]  # more than 64 bits
    return RowSampling(temperatures, seeds, top_k, top_p, min_p)


def logits_of(rows: int, columns: int = VOCAB_SIZE) -> torch.Tensor:
    """Sharp rows and flat ones."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return noise * torch.linspace(1.0, 6.0, rows)[:, None]


def both_ways(choose: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    compiled = choose()
    monkeypatch.setattr(native_sampling, "can_take", lambda _: False)
    return compiled, choose()


@pytest.mark.parametrize("rows", [1, 3, 24])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_one_call_is_both_steps(rows: int, threads: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few rows each is cut into pieces; with many a thread takes a row whole."""
    logits, sampling = logits_of(rows), sampling_of([WAYS[row % len(WAYS)] for row in range(rows)])
    team, positions = Team(threads) if threads else None, list(range(100, 100 + rows))
    allowed = None
    if masked:
        bits = torch.randint(-(2**31), 2**31, (rows, -(-VOCAB_SIZE // 32)), generator=torch.Generator().manual_seed(1))
        allowed = bits.int()
    compiled, by_tensors = both_ways(
        lambda: choose_tokens(logits, sampling, positions, allowed=allowed, team=team), monkeypatch
    )
    assert compiled == by_tensors


@pytest.mark.parametrize("way", WAYS)
def test_columns_may_stand_for_other_tokens(
    way: tuple[float, int, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, sampling = logits_of(6, 64), sampling_of([way] * 6)
    ids = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(n))[:64] for n in range(6)]).int()
    compiled, by_tensors = both_ways(lambda: choose_tokens(logits, sampling, range(6), ids), monkeypatch)
    assert compiled == by_tensors
    assert all(token in row for token, row in zip(compiled, ids.tolist(), strict=True))


def test_all_greedy_rows_take_the_first_of_their_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(5).round()
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert both_ways(lambda: choose_tokens(logits, None, [0] * 5), monkeypatch) == (expected, expected)


def test_greedy_rows_keep_to_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, allowed = logits_of(5), torch.zeros(5, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    allowed[:, 1] = 1
    found = both_ways(lambda: choose_tokens(logits, None, [0] * 5, allowed=allowed), monkeypatch)
    assert found == ([32] * 5, [32] * 5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_chosen_from_what_is_not_finite(
    way: tuple[float, int, float, float], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in its row it stands; the other rows' choices are what they are without."""
    logits, sampling = logits_of(4), sampling_of([way] * 4)
    expected = choose_tokens(logits, sampling, range(4))
    logits[1, VOCAB_SIZE - 1] = logits[3, 7] = value
    expected[1] = expected[3] = -1
    assert both_ways(lambda: choose_tokens(logits, sampling, range(4)), monkeypatch) == (expected, expected)
