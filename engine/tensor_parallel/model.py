"""A target whose parts are on several ranks, as rank 0 sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engine.attention.base import AttentionBackend
from engine.batch import ForwardBatch, ForwardOutput
from engine.config import EngineConfig
from engine.loader import LoadedModel, load
from engine.models.config import ModelFiles, ModelSpec
from engine.models.decoder import HeadSlab
from engine.tensor_parallel.processes import ends_with_the_group, start_ranks
from engine.tensor_parallel.ranks import Argument
from engine.tensor_parallel.shard import Shard
from kernels.head_rows import TailSlabs
from kernels.topk import topk_rows_by_keys


def load_target(config: EngineConfig, files: ModelFiles, spec: ModelSpec) -> LoadedModel:
    """Load the target on as many ranks as the configuration wants, of which this process is rank 0.

    Raises:
        ModelError: as ``load`` does, or there are fewer GPUs than ranks.
    """
    if config.runtime.tensor_parallel_size == 1:
        return load(config, files, spec)
    spec.share(config.runtime.tensor_parallel_size)  # or nothing is started
    ranks = start_ranks(config)
    loaded = load(config, files, spec, ranks=ranks)
    model = ShardedModel(Shard(loaded, config.cache, ranks))
    return replace(loaded, model=model, all_ranks=model)


class ShardedModel:
    """A ``CausalLM``: rank 0 calls all ranks, each computes its part, and the result is here. One thread calls it."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.weight_bytes = shard.model.weight_bytes

    def call(self, name: str, *arguments: Argument) -> Any:
        """Have all ranks run a method of their ``Shard``; returns what it returns here."""
        device = self._shard.loaded.device
        arguments = tuple(one.to(device) if isinstance(one, torch.Tensor) else one for one in arguments)
        with ends_with_the_group():
            self._shard.ranks.send(name, *arguments)
            return self._shard.run(name, arguments)

    def allocate(self, num_blocks: int) -> AttentionBackend:
        attention: AttentionBackend = self.call("allocate", num_blocks)
        return attention

    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        """Run all layers. The cache is the one that was allocated last, whatever ``attention`` is."""
        output: ForwardOutput = self.call("forward", capture, *batch.tensors.values())
        return output

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.call("embed", token_ids)
        return rows

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if not len(hidden):  # a step of unfinished prompts
            return torch.empty(0, self._shard.model.spec.vocab_size, device=hidden.device)
        logits: torch.Tensor = self.call("compute_logits", hidden)
        return logits

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.call("head_rows", token_ids)
        return rows

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        """The core of a draft's head, a part of it at each rank. There is one at a time."""
        num_bytes = self.call("make_core", token_ids)
        columns = slice(None) if token_ids is None else token_ids
        return HeadSlab(lambda hidden: self.compute_logits(hidden)[:, columns], num_bytes, find=self._find)

    def make_tails(self, num_slabs: int, slots: int) -> ShardedTails:
        """The tails of that head."""
        return ShardedTails(self, slots, self.call("make_tails", num_slabs, slots))

    def _find(self, hidden: torch.Tensor, count: int, slabs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``draft_head_topk``: the largest among those that the ranks have found."""
        logits, token_ids = self.call("candidates", count, hidden, slabs)
        values, columns = topk_rows_by_keys(logits, count)
        return values, token_ids.gather(1, columns)


class ShardedTails:
    """Tails of sessions (a ``TailMemory``) whose slots are spread over the ranks.

    Args:
        model: of whose head their rows are.
        slots: tokens in each tail.
        own: the part of rank 0.
    """

    def __init__(self, model: ShardedModel, slots: int, own: TailSlabs) -> None:
        self._model, self.slots, self.num_bytes = model, slots, own.num_bytes

    def write(self, slab: Sequence[int], slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """As ``TailSlabs.write``."""
        places = (torch.from_numpy(np.array(values, np.int64)) for values in (slab, slots, token_ids))
        self._model.call("write_tails", *places)

    def clear(self, slab: int) -> None:
        """As ``TailSlabs.clear``."""
        self._model.call("clear_tail", slab)
