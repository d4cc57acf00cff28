"""Where top-p and top-k cut off wide rows, sharp and flat, against the definition."""

from __future__ import annotations

import pytest
import torch

from evospec.kernels import native
from evospec.kernels.kept_thresholds import Limits, unpack_bits
from evospec.kernels.kept_thresholds import kept_thresholds as kept_thresholds_reference
from evospec.kernels.native import Team
from tests.native_calls import kept_thresholds

VOCAB_SIZE = 20_003
ROUNDING = 3e-6
"""Of a mass, relative: weights are computed in float32."""


def limits(rows: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Limits:
    return Limits(
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), min_p, dtype=torch.float64),
    )


def rows_of_logits() -> torch.Tensor:
    """Sharp and flat, with ties, with excluded tokens, and two whose every 64th vector misleads about the others."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, VOCAB_SIZE, generator=generator) * torch.tensor([[1.0], [3], [8], [2], [3], [1], [1]])
    logits[3] = logits[3].round()
    logits[4, 1::3] = -torch.inf
    is_sampled = torch.arange(VOCAB_SIZE) % 1024 < 16
    logits[5, is_sampled] += 9.0
    logits[6, is_sampled] -= 9.0
    logits[:, 77] += 12.0
    return logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("top_k", [0, 3000])
def test_a_nucleus_is_the_smallest_set_that_reaches_the_mass(temperature: float, top_p: float, top_k: int) -> None:
    logits = rows_of_logits()
    temperatures = torch.full((len(logits),), temperature)
    least = kept_thresholds(logits, temperatures, limits(len(logits), top_k, top_p))
    for row, bound in zip(logits.double(), least.double(), strict=True):
        if top_k:
            row = row[row >= row.sort(descending=True).values[top_k - 1]]
        weights = ((row - row.max()) / temperature).exp()
        needed = top_p * weights.sum()
        assert weights[row >= bound].sum() >= needed * (1 - ROUNDING)
        assert weights[row > bound].sum() < needed * (1 + ROUNDING)
        assert (row == bound).any()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_row_is_cut_as_it_is_alone(temperature: float) -> None:
    two_threads = Team(2) if native.unsupported_reason() is None else None
    logits = rows_of_logits()
    wide, several = torch.full((len(logits),), temperature), limits(len(logits), top_p=0.95)
    together = kept_thresholds(logits, wide, several, team=two_threads)
    for row, expected in zip(logits, together, strict=True):
        alone = kept_thresholds(row.unsqueeze(0), torch.full((1,), temperature), limits(1, top_p=0.95))
        assert alone.item() == expected.item()


@pytest.mark.parametrize("top_k", [1, 40, VOCAB_SIZE - 1, VOCAB_SIZE])
def test_the_largest_are_kept_as_the_reference_keeps_them(top_k: int) -> None:
    logits = rows_of_logits()
    temperatures = torch.full((len(logits),), 0.8)
    both = limits(len(logits), top_k, min_p=1e-4)
    expected = kept_thresholds_reference(logits, temperatures, both)
    torch.testing.assert_close(kept_thresholds(logits, temperatures, both), expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (50, 1.0), (3000, 0.9)])
def test_what_is_not_allowed_does_not_count(top_k: int, top_p: float) -> None:
    logits, temperatures = rows_of_logits(), torch.full((7,), 1.5)
    bits = torch.randint(-(2**31), 2**31, (7, -(-VOCAB_SIZE // 32)), generator=torch.Generator().manual_seed(1)).int()
    masked = logits.masked_fill(~unpack_bits(bits, VOCAB_SIZE), -torch.inf)
    expected = kept_thresholds(masked, temperatures, limits(7, top_k, top_p))
    assert kept_thresholds(logits, temperatures, limits(7, top_k, top_p), bits).tolist() == expected.tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(40, 1.0), (40, 0.9), (0, 0.9)])
def test_what_is_no_number_holds_nobody_up(top_k: int, top_p: float) -> None:
    """As a broken sequence's logits are. With few numbers it went on for ever."""
    logits = torch.full((2, 64), torch.nan)
    logits[0, 3] = 1.0
    least = kept_thresholds(logits, torch.ones(2), limits(2, top_k, top_p))
    assert (least <= 1.0).all()
