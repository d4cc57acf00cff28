"""What ranks compute of a model together is what one process computes, within rounding in float32.

The ranks are threads here, which meet at a barrier; ``tests/e2e/test_tensor_parallel.py`` has processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F

from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig, RuntimeConfig
from evospec.engine.loader import LoadedModel
from evospec.engine.loader import load as load_here
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.decoder import load_model
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.speculation.drafters.session_head import make_tails
from evospec.engine.tensor_parallel.model import Shard, ShardedModel
from evospec.engine.tensor_parallel.ranks import Argument, Ranks
from evospec.kernels.head_rows import EMPTY
from tests.reference_logits import CPU, load, logits_of
from tests.tiny_families import FAMILIES, TinyFamily
from tests.tiny_models import make_directory

VOCAB_SIZE = 509
"""Of which no two ranks have as many tokens."""


class Ended(Exception):
    """Rank 0 has nothing more to do."""


class ThreadRanks(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank: int, all_ranks: list[ThreadRanks], barrier: Barrier) -> None:
        self.rank, self.size = rank, barrier.parties
        self._all, self._barrier = all_ranks, barrier
        self.part = torch.empty(0)
        self.calls = SimpleQueue[tuple[str, list[Argument]] | None]()

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(part)).sum(dim=0)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(part), dim=1)

    def send(self, name: str, *arguments: Argument) -> None:
        for ranks in self._all[1:]:
            ranks.calls.put((name, list(arguments)))

    def receive(self) -> tuple[str, list[Argument]]:
        call = self.calls.get()
        if call is None:
            raise Ended
        return call

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        self.part = part
        self._barrier.wait()
        parts = [ranks.part for ranks in self._all]
        self._barrier.wait()
        return parts


def make_ranks(size: int) -> list[ThreadRanks]:
    barrier, ranks = Barrier(size), list[ThreadRanks]()
    ranks += (ThreadRanks(rank, ranks, barrier) for rank in range(size))
    return ranks


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_logits_are_those_of_the_whole_model(family: TinyFamily, size: int, tmp_path: Path) -> None:
    """All ranks know rows of embedding and head."""
    files = family.make(tmp_path / "model", num_key_value_heads=4, vocab_size=VOCAB_SIZE)
    spec, whole, token_ids = validate_model_files(files), load(files), list(range(5, 505, 10))

    def compute(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        share = load_model(open_weights(files), spec, torch.float32, CPU, ranks=ranks)
        ids = torch.tensor(token_ids)
        return logits_of(share, token_ids), share.embed(ids), share.head_rows(ids)

    with ThreadPoolExecutor(size) as threads:
        shares = list(threads.map(compute, make_ranks(size)))
    expected = logits_of(whole, token_ids), whole.embed(torch.tensor(token_ids)), whole.lm_head[token_ids]
    torch.testing.assert_close(shares[0][0], expected[0], atol=3e-5, rtol=0)
    for _, embedded, rows in shares:
        assert torch.equal(embedded, expected[1])
        assert torch.equal(rows, expected[2])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("core", [None, [3, 8], range(7, 500, 3)], ids=["all", "two", "some"])
def test_a_draft_head_finds_what_it_finds_in_one_process(core: Sequence[int] | None, size: int, tmp_path: Path) -> None:
    """Among the tokens of a core, and those in the tails of sessions, whose slots are written and emptied."""
    files = make_directory(tmp_path / "model", num_key_value_heads=4, vocab_size=VOCAB_SIZE)
    all_ranks = make_ranks(size)
    with ThreadPoolExecutor(size) as threads:
        shards = list(threads.map(lambda ranks: Shard(load_share(files, ranks), CacheConfig(), ranks), all_ranks))
        followers = [threads.submit(shard.follow) for shard in shards[1:]]
        try:
            model = ShardedModel(shards[0])
            found = search(replace(shards[0].loaded, model=model, all_ranks=model), core)
        finally:
            for ranks in all_ranks[1:]:
                ranks.calls.put(None)
        assert all(isinstance(follower.exception(), Ended) for follower in followers)
    for (logits, token_ids), (expected, ids) in zip(found, search(load_share(files), core), strict=True):
        lacking = (0, logits.shape[1] - expected.shape[1])  # rows of fewer tokens end in places that are empty
        torch.testing.assert_close(logits, F.pad(expected, lacking, value=-torch.inf))
        assert torch.equal(token_ids, F.pad(ids, lacking, value=EMPTY))


def load_share(files: ModelFiles, ranks: Ranks | None = None) -> LoadedModel:
    runtime = RuntimeConfig(device="cpu", attention_backend="torch", threads=1)
    config = EngineConfig(model=ModelConfig(dtype="float32"), runtime=runtime)
    return load_here(config, files, validate_model_files(files), ranks=ranks)


def search(loaded: LoadedModel, core: Sequence[int] | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Candidates of five hidden states: one, and more than the smallest vocabulary has."""
    hidden = torch.randn(5, loaded.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    if core is None:
        head = DraftHead(loaded)
        return [head.candidates(hidden, None, count) for count in (1, 64)]
    tails = make_tails(loaded, 3, 7)
    head = DraftHead(loaded, torch.tensor(core), tails)
    tails.write([0, 0, 0, 1, 1, 2], [0, 3, 6, 1, 2, 5], [0, 501, 4, 502, 5, 1])
    tails.write([0, 1], [3, 1], [503, 2])
    tails.clear(2)
    return [head.candidates(hidden, [0, 1, 2, 0, 1], count) for count in (1, 64)]
