"""What ranks compute of a model together is what one process computes, in every family, within rounding in float32.

The ranks are threads here, which meet at a barrier; ``tests/e2e/test_tensor_parallel.py`` has processes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from engine.models.llama import load_model
from engine.models.llama_share import LlamaShare
from engine.models.registry import validate_model_files
from engine.models.weights import open_weights
from engine.tensor_parallel.ranks import Ranks
from tests.reference_logits import CPU, load, logits_of
from tests.tiny_families import FAMILIES, TinyFamily


class ThreadRanks(Ranks):
    """A rank that is a thread; ``parts`` is where all of them put what they have."""

    def __init__(self, rank: int, parts: list[torch.Tensor], barrier: Barrier) -> None:
        self.rank, self.size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(part)).sum(dim=0)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(part), dim=1)

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = part
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_logits_are_those_of_the_whole_model(family: TinyFamily, size: int, tmp_path: Path) -> None:
    """Of a vocabulary that ranks cannot share evenly. All of them know rows of embedding and head."""
    files = family.make(tmp_path / "model", num_key_value_heads=4, vocab_size=509)
    spec, whole, token_ids = validate_model_files(files), load(files), list(range(5, 505, 10))
    parts, barrier = [torch.empty(0)] * size, Barrier(size)

    def compute(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ranks = ThreadRanks(rank, parts, barrier)
        model = load_model(open_weights(files), spec, torch.float32, CPU, ranks=ranks)
        share = LlamaShare(**vars(model), ranks=ranks)
        ids = torch.tensor(token_ids)
        return logits_of(share, token_ids), share.embed(ids), share.head_rows(ids)

    with ThreadPoolExecutor(size) as threads:
        shares = list(threads.map(compute, range(size)))
    expected = logits_of(whole, token_ids), whole.embed(torch.tensor(token_ids)), whole.lm_head[token_ids]
    torch.testing.assert_close(shares[0][0], expected[0], atol=3e-5, rtol=0)
    for _, embedded, rows in shares:
        assert torch.equal(embedded, expected[1])
        assert torch.equal(rows, expected[2])
