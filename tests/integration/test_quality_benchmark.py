"""The positions that the quality benchmark compares are computed as the server computes them."""

from __future__ import annotations

import torch

from benchmarks.common.in_process import engine_config
from benchmarks.quality import CHUNK, FIRST, Chunks
from evospec.engine.config import CacheConfig, SpeculationConfig


def test_log_probabilities_do_not_depend_on_how_many_positions_are_computed_at_once() -> None:
    config = engine_config("smollm2-135m", SpeculationConfig(method="none"))
    config = config.model_copy(update={"cache": CacheConfig(num_blocks=CHUNK // config.cache.block_size)})
    tokens = torch.randint(1000, 40000, (CHUNK,), generator=torch.Generator().manual_seed(0)).tolist()
    four, seven = (Chunks(config, rows).log_probs(tokens) for rows in (4, 7))
    assert four.shape[0] == CHUNK - 1 - FIRST
    assert torch.allclose(four.exp().sum(1), torch.ones(()), atol=1e-4)
    assert torch.equal(four, seven)
