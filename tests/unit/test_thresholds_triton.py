"""The Triton kernel that cuts distributions off, in the interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from evospec.kernels.kept_thresholds import Limits, kept_thresholds
from evospec.kernels.triton.kept_thresholds import kept_thresholds_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOP_K, TOP_P, MIN_P = (
    [0, 5, 40, 0, 20, 0, 3, 0],
    [1.0, 1.0, 1.0, 0.9, 0.5, 1.0, 0.9, 0.999],
    [0.0] * 5 + [0.1, 0.0, 0.0],
)
TEMPERATURES = [1.0, 0.7, 1.0, 1.3, 1.0, 0.8, 0.0, 3.0]


def limits() -> Limits:
    k = torch.tensor(TOP_K, dtype=torch.int32, device=DEVICE)
    return Limits(k, *(torch.tensor(values, dtype=torch.float64, device=DEVICE) for values in (TOP_P, MIN_P)))


@pytest.mark.parametrize("num_values", [64, 2000])
def test_cuts_where_the_reference_does_or_says_that_it_cannot_tell(num_values: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(8, 2000, generator=generator) * 3).to(DEVICE)
    logits[1] = logits[1].round()  # with ties
    temperatures = torch.tensor(TEMPERATURES, device=DEVICE)
    expected = kept_thresholds(logits, temperatures, limits())
    least, suffices = kept_thresholds_triton(logits, temperatures, limits(), num_values)
    torch.testing.assert_close(least[suffices], expected[suffices])
    kept = (logits >= expected.unsqueeze(1)).sum(dim=1)
    cuts_nothing = (expected == -torch.inf).tolist()
    for row, is_enough in enumerate(suffices.tolist()):
        assert is_enough == (num_values == 2000 or cuts_nothing[row] or int(kept[row]) < num_values)


def test_ties_that_may_go_on_are_looked_at_again() -> None:
    logits = torch.zeros(1, 300, device=DEVICE)
    one = Limits(*(values[:1] for values in vars(limits()).values()))
    one = Limits(torch.full_like(one.top_k, 5), one.top_p, one.min_p)
    assert not kept_thresholds_triton(logits, torch.ones(1, device=DEVICE), one, 64)[1].item()
