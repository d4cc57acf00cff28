"""Drafting by an EAGLE-3 layer over the target's features (arXiv 2503.01840)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from engine.attention.base import AttentionBackend, AttentionSpec
from engine.attention.native_cpu import NativeAttention
from engine.batch import Features, ForwardBatch
from engine.config import CacheConfig
from engine.loader import LoadedModel
from engine.model_runner import build_batch, padded_block_tables, slots_of
from engine.models.eagle3 import Eagle3
from engine.models.native_eagle3 import NativeEagle3
from engine.models.native_llama import NativeLlama
from engine.online.adapters import EagleAdapters
from engine.online.verify_log import VerifyLog
from engine.request import Request
from engine.speculation.drafters.base import DraftCosts
from engine.speculation.drafters.eagle_network import EagleNetwork, make_network
from engine.speculation.drafters.head import DraftHead
from engine.speculation.drafters.kv import Chunk, DraftKvTracker, FeatureStore, chain_batches
from engine.speculation.length.policy import StopRule
from engine.step_plan import DraftSlot, ScheduledSequence
from kernels.native_chain import NativeChain
from kernels.native_lora import NativeLora


class EagleDraft:
    """A loaded EAGLE-3 draft.

    Args:
        draft: in the target's dtype, on its device.
        name: for people.
        target: the model it drafts for.
        cache: block size of the KV cache.
        head: the target's head, or the part of it that tokens are drafted from.
        adapters: of the draft, trained while it serves (None: there are none).

    Raises:
        ModelError: the compiled kernels cannot run a draft of this shape.
    """

    def __init__(
        self,
        draft: Eagle3,
        name: str,
        target: LoadedModel,
        cache: CacheConfig,
        head: DraftHead,
        adapters: EagleAdapters | None = None,
    ) -> None:
        self._target, self._cache, self._head, self._adapters = target, cache, head, adapters
        self._network = make_network(draft, target)
        self._capture_layers = draft.config.capture_layers
        self.description = f"eagle3 {name}, vocabulary {head.description}"
        one = self._attention_spec(1)
        width = _stored_width(target, self._capture_layers, adapters)
        stored_bytes = cache.block_size * width * target.dtype.itemsize
        self.vocab = head.vocab
        adapter_bytes = adapters.num_bytes if adapters else 0
        weight_bytes = self._network.weight_bytes + head.num_bytes + adapter_bytes
        self.costs = DraftCosts(weight_bytes, one.bytes_per_block + stored_bytes)

    def make_proposer(self, num_blocks: int) -> EagleProposer:
        """Allocate KV and features for blocks 0 .. num_blocks - 1."""
        attention = self._target.make_attention(self._attention_spec(num_blocks))
        capture = self._capture_layers
        return EagleProposer(self._network, self._target, attention, self._head, capture, self._adapters)

    def _attention_spec(self, num_blocks: int) -> AttentionSpec:
        spec = self._target.spec
        return AttentionSpec(
            num_layers=1,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_blocks=num_blocks,
            block_size=self._cache.block_size,
            dtype=self._target.dtype,
            device=self._target.device,
        )


class EagleProposer:
    """Keeps features in step with the target's KV, and computes entries from them when they are wanted.

    ``after_verification`` stores the features of each computed token in the token's slot. So they are there for exactly
    the tokens whose KV the target has: after a chunk, a preemption, a cached prefix, a long time without drafts. They
    are stored fused, as g, unless training changes how they are fused. What ``propose`` has not seen of a sequence it
    computes from there. Entries of drafted tokens are made from the draft's own guesses of g, and are written again
    before they count.

    Args:
        network: the draft's arithmetic.
        target: whose embedding it shares.
        attention: the draft's KV cache, in the target's block ids.
        head: from hidden states to tokens.
        capture_layers: the target's layers that are the features.
        adapters: of the draft; with them, verified drafts are logged (None: there are none).
    """

    def __init__(
        self,
        network: EagleNetwork,
        target: LoadedModel,
        attention: AttentionBackend,
        head: DraftHead,
        capture_layers: tuple[int, ...],
        adapters: EagleAdapters | None = None,
    ) -> None:
        self.capture_layers = capture_layers
        self._network, self._model, self._attention, self._head = network, target.model, attention, head
        self._block_size, self._device = attention.spec.block_size, target.device
        self._chain: NativeChain | None = None
        """Drafts all tokens of a step in one call, where the compiled kernels can; None: token by token."""
        if isinstance(network, NativeEagle3) and isinstance(target.model, NativeLlama):
            self._chain = head.make_chain(network, target.model)
        self.stops_early = self._chain is not None
        self._entries = DraftKvTracker(attention.spec.num_blocks, self._block_size)
        self._stores_fused = _stores_fused(adapters)
        width, num_slots = _stored_width(target, capture_layers, adapters), attention.spec.num_blocks * self._block_size
        fusing = network if self._stores_fused else None
        self._stored = FeatureStore(num_slots, width, fusing, target.dtype, target.device)
        self._adapters = adapters
        self.verify_log = None
        """Where verified drafts are to be written down."""
        if adapters is not None:
            self.verify_log = VerifyLog(adapters, width, self._stored_before, head.prior_weights, target.team)

    @torch.inference_mode()
    def propose(self, slots: Sequence[DraftSlot], stop: StopRule | None = None) -> None:
        """Draft for the slots that want tokens and whose entries are, or can be brought, up to date."""
        chunks, ready = self._entries.catch_up([slot for slot in slots if slot.num_tokens > 0])
        if not chunks:
            return
        if self._adapters is not None:
            self._adapters.refresh()
            self._adapters.assign([slot.request for slot in slots])
        batch = build_batch(chunks, self._block_size, self._device)
        of_tokens = (chunk.request for chunk in chunks for _ in chunk.token_ids)
        a = self._forward(batch, of_tokens, self._g_before(chunks))
        if not ready:
            return
        if self._chain is not None:
            self._draft_chains(self._chain, a, ready, stop)
            return
        self._head.draft(self._network.head_input(a), ready)
        for rows, longer, batch in chain_batches(ready, self._block_size, self._device):
            of_tokens = (slot.request for slot in longer)
            a = self._forward(batch, of_tokens, a if len(rows) == len(a) else a[rows])
            self._head.draft(self._network.head_input(a), longer)

    def _draft_chains(
        self, chain: NativeChain, a: torch.Tensor, ready: Sequence[DraftSlot], stop: StopRule | None
    ) -> None:
        """All drafts of the slots in one call; ``a`` [B, hidden]: the draft's state after their last known tokens."""
        order = sorted(range(len(ready)), key=lambda row: -ready[row].num_tokens)
        slots = [ready[row] for row in order]
        lora = self._adapters.rows(slot.request for slot in slots) if self._adapters else None
        adapted = None if lora is None else NativeLora(lora)
        assert isinstance(self._attention, NativeAttention)
        tables, cache = padded_block_tables([slot.block_ids for slot in slots]), self._attention.cache
        self._head.draft_chains(chain, a[order], slots, tables, cache, adapted, stop)

    def num_unread(self, request: Request) -> int:
        """Tokens of a request that have no entry yet."""
        return self._entries.num_behind(request)

    @torch.inference_mode()
    def after_verification(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: Features | None
    ) -> None:
        """Store the features of all tokens; those of refused drafts are overwritten when their slots are."""
        assert features is not None
        for sequence in sequences:
            self._entries.mark_computed(sequence, 0)
        self._stored.add(features)

    def forget(self, request: Request) -> None:
        """Drop what is known of a request."""
        self._entries.forget(request)

    def _forward(self, batch: ForwardBatch, of_tokens: Iterable[Request], g: torch.Tensor) -> torch.Tensor:
        """a [n, hidden] of the tokens that want logits; ``of_tokens``: whose each token of the batch is."""
        lora = self._adapters.rows(of_tokens) if self._adapters else None
        return self._network.forward(batch, self._attention, self._model.embed(batch.token_ids), g, lora)

    def _g_before(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """[T, hidden]: g of the position before each token."""
        stored = self._stored_before(chunks)
        return stored if self._stores_fused else self._network.fuse(stored)

    def _stored_before(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """What is stored of the position before each token, a row each."""
        slots: list[int] = []
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            if chunk.start == 0:
                slots.append(self._stored.before_first)
            slots += slots_of(chunk.block_ids, max(chunk.start - 1, 0), end - 1, self._block_size)
        return self._stored.rows(torch.from_numpy(np.array(slots)).to(self._device))


def _stores_fused(adapters: EagleAdapters | None) -> bool:
    """Whether g is stored: one fusion for each token, and a third of the memory."""
    return adapters is None or not adapters.trains_fusion


def _stored_width(target: LoadedModel, capture_layers: Sequence[int], adapters: EagleAdapters | None) -> int:
    """Values that are stored of each token."""
    return target.spec.hidden_size * (1 if _stores_fused(adapters) else len(capture_layers))
