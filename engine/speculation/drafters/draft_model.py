"""Drafting by a smaller model with the same tokens (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.batch import ForwardBatch
from evospec.engine.config import CacheConfig
from evospec.engine.loader import LoadedModel
from evospec.engine.model_runner import attention_spec, build_batch
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import DraftCosts, Proposer
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.speculation.drafters.kv import DraftKvTracker, chain_batches
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import DraftSlot, Proposal, Proposals, Step


class DraftModel:
    """A loaded draft model."""

    def __init__(self, loaded: LoadedModel, name: str, cache: CacheConfig, head: DraftHead) -> None:
        self._loaded, self._cache, self._head = loaded, cache, head
        self.description = f"draft model {name}, vocabulary {head.description}"
        self.vocab = head.vocab
        self.costs = DraftCosts(loaded.model.weight_bytes + head.num_bytes, self._attention_spec(1).bytes_per_block)

    def make_proposer(self, num_blocks: int) -> Proposer:
        attention = self._loaded.make_attention(self._attention_spec(num_blocks))
        return DraftModelProposer(self._loaded, attention, self._head)

    def _attention_spec(self, num_blocks: int) -> AttentionSpec:
        return attention_spec(self._loaded, self._cache, num_blocks)


class DraftModelProposer(Proposer):
    """Runs the draft model on what it has not seen of a sequence, then token by token."""

    def __init__(self, loaded: LoadedModel, attention: AttentionBackend, head: DraftHead) -> None:
        self._loaded, self._attention, self._head = loaded, attention, head
        self._block_size = attention.spec.block_size
        self._entries = DraftKvTracker(attention.spec.num_blocks, self._block_size)

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        chunks, ready = self._entries.catch_up([slot for slot in slots if slot.num_tokens > 0])
        if not chunks:
            return {}
        hidden = self._forward(build_batch(chunks, self._block_size, self._loaded.device))
        proposals = {slot.request: Proposal() for slot in ready}
        if not ready:
            return proposals
        self._head.draft(hidden, proposals)
        for _, longer, batch in chain_batches(ready, proposals, self._block_size, self._loaded.device):
            self._head.draft(self._forward(batch), {slot.request: proposals[slot.request] for slot in longer})
        return proposals

    def num_unread(self, request: Request) -> int:
        return self._entries.num_behind(request)

    def learn(self, step: Step) -> None:
        """Count the entries of accepted drafts as computed; new tokens are computed by a later ``propose``."""
        for one in step.verified:
            # What was copied has no entries; the last draft was never an input, so it has none either.
            drafted = 0 if one.sequence.proposal.is_copied else one.sequence.num_draft_tokens
            self._entries.mark_computed(one.sequence, max(min(one.num_chosen, drafted) - 1, 0))

    def preempt(self, request: Request) -> None:
        self._entries.forget(request)

    def end(self, request: Request) -> None:
        self._entries.forget(request)

    def _forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states [L, hidden] of the rows whose logits are wanted."""
        return self._loaded.model.forward(batch, self._attention).hidden[batch.logits_indices]
