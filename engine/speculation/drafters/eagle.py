"""Drafting by an EAGLE-3 layer over the target's features (arXiv 2503.01840)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec
import numpy as np
import torch
import torch.nn.functional as F

from evospec.engine.attention import flashinfer
from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.attention.native_cpu import NativeAttention
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.batch import ForwardBatch, padded_block_tables
from evospec.engine.config import CacheConfig
from evospec.engine.loader import LoadedModel
from evospec.engine.model_runner import build_batch, lay_out
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.native_decoder import NativeDecoder
from evospec.engine.models.native_eagle3 import NativeEagle3
from evospec.engine.online.adapters import EagleAdapters
from evospec.engine.online.run_writer import RunWriter
from evospec.engine.online.verify_log import VerifyLog
from evospec.engine.online.whole_draft import WholeDraft
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import DraftCosts, Proposer
from evospec.engine.speculation.drafters.eagle_network import EagleNetwork, make_network
from evospec.engine.speculation.drafters.gpu_chain import GpuChain
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.speculation.drafters.kv import Chunk, DraftKvTracker, FeatureStore, chain_batches
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import DraftSlot, Proposal, Proposals, Step
from evospec.kernels.batched_lora import LoraRows
from evospec.kernels.native_chain import NativeChain, UnreadTokens
from evospec.kernels.upload import upload

Embed = Callable[[torch.Tensor], torch.Tensor]


class EagleDraft:
    """A loaded EAGLE-3 draft.

    Args:
        draft: in the target's dtype, on its device.
        name: for people.
        target: the model it drafts for.
        cache: block size of the KV cache.
        head: the target's head, or the part of it that tokens are drafted from.
        adapters: of the draft, trained while it serves (None: there are none).
        embedding: [vocab, hidden], its own (None: it has the target's).
    """

    def __init__(
        self,
        draft: Eagle3,
        name: str,
        target: LoadedModel,
        cache: CacheConfig,
        head: DraftHead,
        adapters: EagleAdapters | None = None,
        embedding: torch.Tensor | None = None,
    ) -> None:
        self.target, self.head, self.adapters, self.config, self._cache = target, head, adapters, draft.config, cache
        self.network = make_network(draft, target, embedding)
        self.embed = _embedder(self.network, target, embedding)
        if isinstance(adapters, WholeDraft):
            adapters.network = self.network
        self.stores_fused = adapters is None or not adapters.trains_fusion
        """Whether g is stored of each token: one fusion, and a third of the memory."""
        self.stored_width = draft.config.hidden_size
        """Values that are stored of each token."""
        if adapters is not None and adapters.trains_fusion:
            self.stored_width = draft.config.recorded_size if adapters.records_output else draft.config.fused_size
        self.description = f"eagle3 {name}, vocabulary {head.description}"
        self.vocab = head.vocab
        self.on_gpu = head.on_gpu() if target.cuda_graphs else None
        """The same as ``head`` in CUDA graphs."""
        adapter_bytes = adapters.num_bytes if adapters else 0
        embedding_bytes = 0 if embedding is None or isinstance(self.network, NativeEagle3) else embedding.nbytes
        weight_bytes = self.network.weight_bytes + embedding_bytes + head.num_bytes + adapter_bytes
        stored_bytes = cache.block_size * self.stored_width * target.dtype.itemsize
        self.costs = DraftCosts(weight_bytes, self._attention_spec(1).bytes_per_block + stored_bytes)

    def make_proposer(self, num_blocks: int) -> EagleProposer:
        """Allocate KV and features for blocks 0 .. num_blocks - 1, and one that is nobody's where there are graphs."""
        spec = self._attention_spec(num_blocks + int(self.target.cuda_graphs))
        return EagleProposer(self, _make_attention(spec, self.target))

    def _attention_spec(self, num_blocks: int) -> AttentionSpec:
        config = self.config
        return AttentionSpec(
            num_layers=1,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_blocks=num_blocks,
            block_size=self._cache.block_size,
            dtype=self.target.dtype,
            device=self.target.device,
            windows=(config.variant.sliding_window,),
        )


class EagleProposer(Proposer):
    """Keeps features in step with the target's KV, and computes entries from them when they are wanted.

    ``learn`` stores the features of each computed token in the token's slot. So they are there for exactly
    the tokens whose KV the target has: after a chunk, a preemption, a cached prefix, a long time without drafts. They
    are stored fused, as g, unless training changes how they are fused. What ``propose`` has not seen of a sequence it
    computes from there. Entries of drafted tokens are made from the draft's own guesses of g, and are written again
    before they count.

    Where a sequence's first token has no entry, that of any other lies in the slot of the token before it. So the last
    entry of a block depends on a token of the next: sequences that share a block and go on in different ways write it
    in turn. That costs acceptance only.

    Args:
        draft: what is loaded.
        attention: the draft's KV cache, in the target's block ids.
    """

    def __init__(self, draft: EagleDraft, attention: AttentionBackend) -> None:
        network, target, head, adapters, config = draft.network, draft.target, draft.head, draft.adapters, draft.config
        self.capture_layers = config.capture_layers
        if adapters is not None and adapters.records_output:
            self.capture_layers += (config.num_target_layers - 1,)
        self._network, self._embed, self._attention, self._head = network, draft.embed, attention, head
        self._block_size, self._device = attention.spec.block_size, target.device
        self._entries = DraftKvTracker(attention.spec.num_blocks, self._block_size)
        self._stores_fused, self._fused_size = draft.stores_fused, config.fused_size
        fusing = network if self._stores_fused else None
        num_slots = attention.spec.num_blocks * self._block_size
        self._stored = FeatureStore(num_slots, draft.stored_width, fusing, target.dtype, target.device)
        self._adapters = adapters
        self.whole_draft = adapters if isinstance(adapters, WholeDraft) else None
        self._num_loads = 0
        """How often its weights were exchanged, when entries were made last."""
        self._chain = self._make_chain(draft)
        self.stops_early = isinstance(self._chain, NativeChain)
        if adapters is not None:
            prior_weights = (lambda _: None) if head.vocab is None else head.vocab.prior_weights
            writer = RunWriter(adapters.config, draft.stored_width, self._stored_before, prior_weights)
            self.verify_log = VerifyLog(adapters, writer, target.team)

    def _make_chain(self, draft: EagleDraft) -> NativeChain | GpuChain | None:
        """What drafts all tokens of a step at once, by the compiled kernels or CUDA graphs; None: token by token."""
        network, target, attention = draft.network, draft.target, self._attention
        if isinstance(network, NativeEagle3) and isinstance(target.model, NativeDecoder):
            assert isinstance(attention, NativeAttention)
            return draft.head.make_chain(network, target.model, attention.cache)
        if draft.on_gpu is not None and isinstance(attention, flashinfer.FlashInferAttention):
            sizes = self._stored.before_first, -(-target.max_model_len // self._block_size)
            lora = None if self.whole_draft is not None else self._adapters
            return GpuChain(network, draft.embed, attention, draft.on_gpu, self._g_of, *sizes, lora)
        return None

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        if self.whole_draft is not None and self.whole_draft.num_loads != self._num_loads:
            self._num_loads = self.whole_draft.num_loads
            self._entries.outdate()
        chunks, ready = self._entries.catch_up([slot for slot in slots if slot.num_tokens > 0])
        if not chunks:
            return {}
        if self._adapters is not None:
            self._adapters.refresh()
            self._adapters.assign([slot.request for slot in slots])
        if self._network.shift:
            chunks = [_one_place_earlier(chunk) for chunk in chunks if chunk.start + len(chunk.token_ids) > 1]
        proposals = self._draft(chunks, ready, stop)
        if self._adapters is not None:
            for request, proposal in proposals.items():
                proposal.version = self._adapters.assignment(request).version
        return proposals

    def _draft(
        self, chunks: Sequence[Chunk], ready: Sequence[DraftSlot], stop: EarlyStop | None
    ) -> dict[Request, Proposal]:
        """Write the entries of tokens, and draft for the slots, whose chunks are the first."""
        if ready and isinstance(self._chain, NativeChain):
            return self._read_and_draft(self._chain, chunks, ready, stop)
        a = self._read(chunks)
        if not ready:
            return {}
        if isinstance(self._chain, GpuChain) and self._chain.can_draft(ready):
            return {slot.request: one for slot, one in zip(ready, self._chain.draft(a, ready), strict=True)}
        proposals = {slot.request: Proposal() for slot in ready}
        self._head.draft(self._network.head_input(a), proposals)
        shift = self._network.shift
        for rows, longer, batch in chain_batches(ready, proposals, self._block_size, self._device, shift):
            if len(rows) < len(a):
                a = a[upload(self._device, np.array(rows))[0]]
            of_rows = {slot.request: proposals[slot.request] for slot in longer}
            a = self._forward(batch, of_rows, a)
            self._head.draft(self._network.head_input(a), of_rows)
        return proposals

    def _read(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Write the entries of tokens; the draft's state [L, hidden] at those whose logits are wanted."""
        if isinstance(self._chain, GpuChain) and self._chain.can_read(chunks):
            return self._chain.read(chunks, self._slots_before(chunks))
        batch = build_batch(chunks, self._block_size, self._device)
        of_tokens = (chunk.request for chunk in chunks for _ in chunk.token_ids)
        slots = upload(self._device, np.array(self._slots_before(chunks)))
        return self._forward(batch, of_tokens, self._g_of(*slots))

    def _read_and_draft(
        self, chain: NativeChain, chunks: Sequence[Chunk], ready: Sequence[DraftSlot], stop: EarlyStop | None
    ) -> dict[Request, Proposal]:
        """``_draft``, all in one call of the compiled kernels."""
        order = sorted(range(len(ready)), key=lambda row: -ready[row].num_tokens)
        slots, chunks = [ready[row] for row in order], [*(chunks[row] for row in order), *chunks[len(ready) :]]
        flat, before, g = lay_out(chunks, self._block_size), self._slots_before(chunks), self._stored.all_rows
        if not self._stores_fused:
            g, before = self._g_of(torch.tensor(before)).bfloat16(), list(range(len(before)))
        lora = self._lora(chunk.request for chunk in chunks for _ in chunk.token_ids)
        unread = UnreadTokens(
            flat.token_ids, flat.positions, flat.slot_mapping, flat.query_start_loc, flat.seq_lens, before, g, lora
        )
        tables = padded_block_tables(flat.block_ids)
        of_slots = self._lora(slot.request for slot in slots)
        proposals = self._head.draft_chains(chain, unread, slots, tables, of_slots, stop)
        return {slot.request: proposal for slot, proposal in zip(slots, proposals, strict=True)}

    def _lora(self, of_rows: Iterable[Request]) -> LoraRows | None:
        return self._adapters.rows(of_rows) if self._adapters else None

    def num_unread(self, request: Request) -> int:
        return self._entries.num_behind(request)

    def learn(self, step: Step) -> None:
        """Store the features of all tokens; those of refused drafts are overwritten when their slots are."""
        assert step.features is not None
        for one in step.verified:
            self._entries.mark_computed(one.sequence, 0)
        self._stored.add(step.features)

    def preempt(self, request: Request) -> None:
        self._entries.forget(request)

    def end(self, request: Request) -> None:
        self._entries.forget(request)
        if self._adapters is not None:
            self._adapters.forget(request)

    def _forward(self, batch: ForwardBatch, of_tokens: Iterable[Request], g: torch.Tensor) -> torch.Tensor:
        """a [n, hidden] of the tokens that want logits; ``of_tokens``: whose each token of the batch is."""
        return self._network.forward(batch, self._attention, self._embed(batch.token_ids), g, self._lora(of_tokens))

    def _g_of(self, slots: torch.Tensor) -> torch.Tensor:
        """[T] int64 → g of the tokens in these slots, [T, hidden]."""
        stored = self._stored.rows(slots)
        return stored if self._stores_fused else self._network.fuse(stored[:, : self._fused_size])

    def _stored_before(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """What is stored of the position before each token, a row each."""
        return self._stored.rows(*upload(self._device, np.array(self._slots_before(chunks))))

    def _slots_before(self, chunks: Sequence[Chunk]) -> list[int]:
        return self._stored.slots_before(chunks, self._network.shift, self._block_size)


def _one_place_earlier(chunk: Chunk) -> Chunk:
    """The same tokens but a sequence's first, with the places of their entries where those lie one place earlier."""
    skipped = 1 if chunk.start == 0 else 0
    return msgspec.structs.replace(chunk, start=chunk.start + skipped - 1, token_ids=chunk.token_ids[skipped:])


def _make_attention(spec: AttentionSpec, target: LoadedModel) -> AttentionBackend:
    """The target's kind, or the torch one for heads that this does not have."""
    lacks_heads = {
        "native": spec.head_dim % 32 != 0,
        "flashinfer": flashinfer.unsupported_reason(spec) is not None,
        "torch": False,
    }
    return TorchPagedAttention(spec) if lacks_heads[target.backend] else target.make_attention(spec)


def _embedder(network: EagleNetwork, target: LoadedModel, embedding: torch.Tensor | None) -> Embed:
    if embedding is None:
        return target.model.embed
    if isinstance(network, NativeEagle3) and network.embedding is not None:
        return partial(network.layer.embed, network.embedding)
    return lambda token_ids: F.embedding(token_ids, embedding)
