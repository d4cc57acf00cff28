"""A target whose parts are on several ranks: what each rank computes of it, and the whole, as rank 0 sees it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F

from evospec.engine.attention.base import AttentionBackend
from evospec.engine.batch import ForwardBatch, ForwardOutput
from evospec.engine.config import CacheConfig
from evospec.engine.loader import LoadedModel
from evospec.engine.model_runner import attention_spec
from evospec.engine.models.decoder import HeadSlab, TorchDecoder
from evospec.engine.tensor_parallel.ranks import Argument, Ranks, ends_with_the_group
from evospec.kernels.draft_head import draft_head_topk
from evospec.kernels.head_rows import EMPTY, Core, TailSlabs
from evospec.kernels.topk import topk_rows_by_keys


class Shard:
    """This rank's part of all that is shared. All ranks run the same methods in the same order, as rank 0 calls them.

    ``loaded`` is this rank's share of the target.
    """

    def __init__(self, loaded: LoadedModel, cache: CacheConfig, ranks: Ranks) -> None:
        assert isinstance(loaded.model, TorchDecoder)
        self.model, self.ranks = loaded.model, ranks
        self.loaded, self._cache = loaded, cache

    def follow(self) -> NoReturn:
        """At any rank but 0: run what rank 0 calls, until the process is killed."""
        while True:
            self.run(*self.ranks.receive())

    @torch.inference_mode()
    def run(self, name: str, arguments: Sequence[Argument]) -> Any:
        """Run a method by its name, which may be one of the model's (``model.embed``) or of the tails'."""
        return attrgetter(name)(self)(*arguments)

    def allocate(self, num_blocks: int) -> AttentionBackend:
        """Make this rank's part of the KV cache."""
        self._attention = self.loaded.make_attention(attention_spec(self.loaded, self._cache, num_blocks))
        return self._attention

    def forward(self, capture: Sequence[int], *batch: Any) -> ForwardOutput:
        """As the model's; ``batch``: the tensors of a ``ForwardBatch`` on the CPU."""
        return self.model.forward(ForwardBatch(*batch).on(self.loaded.device), self._attention, capture)

    def make_core(self, token_ids: torch.Tensor | None) -> int:
        """Take this rank's part of a draft's core (None: all tokens); returns the bytes of what is copied for it."""
        mine = self.ranks.share(self.model.spec.vocab_size if token_ids is None else len(token_ids))
        if token_ids is None:
            ids, rows = torch.arange(mine.start, mine.stop, device=self.loaded.device), self.model.lm_head
        else:
            ids, rows = token_ids[mine], self.model.head_rows(token_ids)[mine].clone()
        self._core = Core(lambda hidden: F.linear(hidden, rows).float(), ids.int(), rows)
        return 0 if token_ids is None else rows.nbytes

    def make_tails(self, num_slabs: int, slots: int) -> TailSlabs:
        """Make this rank's part of all tails. Slot s is at the rank s modulo their number."""
        spec, each = self.model.spec, -(-slots // self.ranks.size)
        where = self.loaded.dtype, self.loaded.device
        self.tails = TailSlabs(self.model.head_rows, num_slabs, each, spec.hidden_size, *where)
        return self.tails

    def write_tails(self, slabs: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Put tokens [n] into slots [n] of slabs [n]; all are int64 on the CPU."""
        slabs, slots, token_ids = (values.to(self.loaded.device) for values in (slabs, slots, token_ids))
        rows = self.model.head_rows(token_ids)
        mine = slots % self.ranks.size == self.ranks.rank
        self.tails.put(slabs[mine], slots[mine] // self.ranks.size, token_ids[mine], rows[mine])

    def candidates(
        self, count: int, hidden: torch.Tensor, slabs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest logits [N, size * count] of each rank's part of core and tails, and their token ids; at rank 0.

        ``hidden`` and ``slabs`` are as for ``draft_head_topk``.
        """
        tails = None if slabs is None else self.tails
        logits, token_ids = draft_head_topk(hidden, self._core, count, tails, slabs)
        lacking = (0, count - logits.shape[1])
        padded = F.pad(logits, lacking, value=-torch.inf), F.pad(token_ids, lacking, value=EMPTY)
        return self.ranks.gather(padded[0]), self.ranks.gather(padded[1])


class ShardedModel:
    """A ``CausalLM``: rank 0 calls all ranks, each computes its part, and the result is here. One thread calls it."""

    def __init__(self, shard: Shard) -> None:
        self._shard, self._device = shard, shard.loaded.device
        self.weight_bytes = shard.model.weight_bytes

    def call(self, name: str, *arguments: Argument) -> Any:
        """Have all ranks run a method of their ``Shard``; returns what it returns here. Tensors are on one device."""
        with ends_with_the_group():
            self._shard.ranks.send(name, *arguments)
            return self._shard.run(name, arguments)

    def allocate(self, num_blocks: int) -> AttentionBackend:
        attention: AttentionBackend = self.call("allocate", num_blocks)
        return attention

    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        """Run all layers. The cache is the one that was allocated last, whatever ``attention`` is.

        The batch goes to the other ranks as it is on the CPU, where each plans its attention.
        """
        output: ForwardOutput = self.call("forward", capture, *batch.host.tensors.values())
        return output

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.call("model.embed", token_ids.to(self._device))
        return rows

    def compute_logits(self, hidden: torch.Tensor, only_largest: bool = False) -> torch.Tensor:
        if not len(hidden):  # a step of unfinished prompts
            return torch.empty(0, self._shard.model.spec.vocab_size, device=hidden.device)
        logits: torch.Tensor = self.call("model.compute_logits", hidden)
        return logits

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.call("model.head_rows", token_ids.to(self._device))
        return rows

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        """The core of a draft's head, a part of it at each rank. There is one at a time."""
        token_ids = None if token_ids is None else token_ids.to(self._device)
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
    """Tails of sessions (a ``TailMemory``) whose ``slots`` are spread over the ranks; ``own``: the part of rank 0."""

    def __init__(self, model: ShardedModel, slots: int, own: TailSlabs) -> None:
        self._model, self.slots, self.num_bytes = model, slots, own.num_bytes

    def write(self, slab: Sequence[int], slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """As ``TailSlabs.write``."""
        places = (torch.from_numpy(np.array(values, np.int64)) for values in (slab, slots, token_ids))
        self._model.call("write_tails", *places)

    def clear(self, slab: int) -> None:
        """As ``TailSlabs.clear``."""
        self._model.call("tails.clear", slab)
