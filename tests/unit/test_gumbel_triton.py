"""The Triton kernel that samples, in Triton's interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from evospec.kernels.gumbel_argmax import gumbel_argmax, row_keys
from evospec.kernels.triton.gumbel_argmax import gumbel_argmax_triton
from tests.combinations import pairwise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pairwise(columns=[5, 1000, 9000], cut=[False, True], with_ids=[False, True])
def test_the_same_choices(columns: int, cut: bool, with_ids: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(4, columns, generator=generator).to(DEVICE) * 3
    seeds, positions = (torch.tensor(values, device=DEVICE) for values in ([1, -2, 3, 2**62], [0, 7, 7, 100_000]))
    temperatures = torch.tensor([0.0, 1.0, 0.7, 1.3], device=DEVICE)
    ids = (torch.randperm(columns, generator=generator) + 17).expand(4, -1).to(DEVICE) if with_ids else None
    least = logits.median(dim=1).values if cut else None
    ours = gumbel_argmax_triton(logits, row_keys(seeds, positions), ids, temperatures=temperatures, least=least)
    expected = gumbel_argmax(logits, seeds, positions, ids, temperatures=temperatures, least=least)
    assert ours.tolist() == expected.tolist()
