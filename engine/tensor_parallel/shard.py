"""What each rank has, and computes of the target and of a draft's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionBackend
from engine.batch import ForwardBatch, ForwardOutput
from engine.config import CacheConfig
from engine.loader import LoadedModel
from engine.model_runner import attention_spec
from engine.models.decoder_share import DecoderShare
from engine.tensor_parallel.ranks import Argument, Ranks
from kernels.draft_head import draft_head_topk
from kernels.head_rows import EMPTY, Core, TailSlabs


class Shard:
    """This rank's part of all that is shared. All ranks run the same methods in the same order, as rank 0 calls them.

    Args:
        loaded: this rank's share of the target.
        cache: shape of the KV cache.
        ranks: all of them.
    """

    def __init__(self, loaded: LoadedModel, cache: CacheConfig, ranks: Ranks) -> None:
        assert isinstance(loaded.model, DecoderShare)
        self.model, self.ranks = loaded.model, ranks
        self.loaded, self._cache = loaded, cache

    def follow(self) -> NoReturn:
        """At any rank but 0: run what rank 0 calls, until the process is killed."""
        while True:
            self.run(*self.ranks.receive())

    @torch.inference_mode()
    def run(self, name: str, arguments: Sequence[Argument]) -> Any:
        """Run a method by its name."""
        return getattr(self, name)(*arguments)

    def allocate(self, num_blocks: int) -> AttentionBackend:
        """Make this rank's part of the KV cache."""
        self._attention = self.loaded.make_attention(attention_spec(self.loaded, self._cache, num_blocks))
        return self._attention

    def forward(self, capture: Sequence[int], *batch: Any) -> ForwardOutput:
        """As the model's; ``batch``: the tensors of a ``ForwardBatch``."""
        return self.model.forward(ForwardBatch(*batch), self._attention, capture)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As the model's."""
        return self.model.embed(token_ids)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the model's, whole at rank 0 only."""
        return self.model.compute_logits(hidden)

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As the model's."""
        return self.model.head_rows(token_ids)

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
        self._tails = TailSlabs(self.model.head_rows, num_slabs, each, spec.hidden_size, *where)
        return self._tails

    def write_tails(self, slabs: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Put tokens [n] into slots [n] of slabs [n]."""
        rows = self.model.head_rows(token_ids)
        mine = slots % self.ranks.size == self.ranks.rank
        self._tails.put(slabs[mine], slots[mine] // self.ranks.size, token_ids[mine], rows[mine])

    def clear_tail(self, slab: int) -> None:
        """Empty all slots of a slab."""
        self._tails.clear(slab)

    def candidates(
        self, count: int, hidden: torch.Tensor, slabs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest logits [N, size * count] of each rank's part of core and tails, and their token ids; at rank 0.

        ``hidden`` and ``slabs`` are as for ``draft_head_topk``.
        """
        tails = None if slabs is None else self._tails
        logits, token_ids = draft_head_topk(hidden, self._core, count, tails, slabs)
        lacking = (0, count - logits.shape[1])
        padded = F.pad(logits, lacking, value=-torch.inf), F.pad(token_ids, lacking, value=EMPTY)
        return self.ranks.gather(padded[0]), self.ranks.gather(padded[1])
