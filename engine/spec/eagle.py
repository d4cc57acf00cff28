"""Drafting by an EAGLE-3 layer over the target's features (arXiv 2503.01840)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.attention.base import AttentionBackend, AttentionSpec
from engine.batch import ForwardBatch
from engine.config import CacheConfig
from engine.loader import CausalLM, LoadedModel
from engine.model_runner import build_batch
from engine.models.eagle3 import Eagle3, load_draft
from engine.models.llama import RotaryEmbedding
from engine.request import Request
from engine.scheduler import DraftSlot, ScheduledSequence
from engine.spec.draft_head import DraftHead
from engine.spec.proposer import DraftCosts, Proposer

MAX_PENDING_TOKENS = 64
"""Tokens of a sequence that may wait for their entries while it is not drafted for."""


class EagleNetwork(Protocol):
    """The draft's arithmetic, over a KV cache of its own."""

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features [T, n * hidden] → g [T, hidden]."""
        ...

    def forward(self, batch: ForwardBatch, g: torch.Tensor) -> torch.Tensor:
        """Write the entries of a ragged batch's tokens.

        Args:
            batch: token ids, their positions and slots.
            g: [T, hidden], of the position before each token: fused features, or the last step's result.

        Returns:
            a [L, hidden] of the rows ``batch.logits_indices``: g of the next token.
        """
        ...

    def head_input(self, a: torch.Tensor) -> torch.Tensor:
        """[L, hidden] → what the target's head projects, [L, hidden]."""
        ...


class TorchEagleNetwork:
    """``EagleNetwork`` of torch operations and an attention backend: any device, any dtype."""

    def __init__(self, draft: Eagle3, target: CausalLM, attention: AttentionBackend, rotary: RotaryEmbedding) -> None:
        self._draft, self._target, self._attention, self._rotary = draft, target, attention, rotary
        self._dtype = draft.fc.weight.dtype

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        return self._draft.fuse(features.to(self._dtype))

    def forward(self, batch: ForwardBatch, g: torch.Tensor) -> torch.Tensor:
        self._attention.plan(batch)
        q, k, v = self._draft.qkv(self._target.embed(batch.token_ids).to(self._dtype), g)
        q, k = self._rotary(q, batch.positions), self._rotary(k, batch.positions)
        attended = self._attention.forward(0, q, k, v)
        wanted = batch.logits_indices
        return self._draft.output(g[wanted], attended[wanted])

    def head_input(self, a: torch.Tensor) -> torch.Tensor:
        return self._draft.head_input(a)


class EagleDraft:
    """A loaded EAGLE-3 draft.

    Args:
        directory: its weights and config.
        target: the model it drafts for.
        name: the target's name, for messages.
        cache: block size of the KV cache.
        head: the target's head, or the part of it that tokens are drafted from.

    Raises:
        ModelError: the files cannot be read, or the draft is for another model.
    """

    def __init__(self, directory: Path, target: LoadedModel, cache: CacheConfig, head: DraftHead) -> None:
        self._target, self._cache, self._head = target, cache, head
        self._draft = load_draft(directory, target.dtype, target.device)
        self._draft.config.check_target(target.spec, directory)
        self.capture_layers = self._draft.config.capture_layers
        self.description = f"eagle3 {directory.name}, vocabulary {head.description}"
        weights = sum(p.numel() * p.element_size() for p in self._draft.parameters())
        boundary = target.spec.hidden_size * self._draft.fc.weight.element_size()
        self.costs = DraftCosts(weights + head.num_bytes, self._attention_spec(1).bytes_per_block + boundary)

    def make_proposer(self, num_blocks: int) -> Proposer:
        """Allocate KV for blocks 0 .. num_blocks - 1."""
        target = self._target
        rotary = RotaryEmbedding(target.spec, target.max_model_len, target.device)
        attention = target.make_attention(self._attention_spec(num_blocks))
        network = TorchEagleNetwork(self._draft, target.model, attention, rotary)
        features = torch.zeros(num_blocks, target.spec.hidden_size, dtype=target.dtype, device=target.device)
        return EagleProposer(network, self._head, self.capture_layers, features, self._cache.block_size)

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


@dataclass(slots=True)
class _Pending:
    """Tokens of a sequence that have no entry yet: from position ``start`` on, one row of g each."""

    start: int
    g: list[torch.Tensor]
    """Pieces [n, hidden]."""
    count: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one sequence whose entries are computed; a ``BatchSequence``."""

    start: int
    token_ids: list[int]
    num_logits: int
    block_ids: Sequence[int]


class EagleProposer:
    """Keeps the draft's entries in step with the target's.

    Prompts are computed as the target computes them. A verified step's new tokens wait until their sequence is drafted
    for again, or there are ``MAX_PENDING_TOKENS`` of them. A finished sequence's last tokens keep the entries that
    drafting made, or none; whoever finds those blocks in the prefix cache has a slightly worse draft.

    Args:
        network: the draft's arithmetic and KV cache.
        head: from hidden states to tokens.
        capture_layers: the target's layers that are the features.
        last_features: [num_blocks, hidden], for g after the last token of each block, where a cached prefix may end.
        block_size: tokens per block.
    """

    def __init__(
        self,
        network: EagleNetwork,
        head: DraftHead,
        capture_layers: tuple[int, ...],
        last_features: torch.Tensor,
        block_size: int,
    ) -> None:
        self.capture_layers = capture_layers
        self._network, self._head = network, head
        self._last_features, self._block_size = last_features, block_size
        self._device = last_features.device
        self._pending: dict[str, _Pending] = {}

    @torch.inference_mode()
    def propose(self, slots: Sequence[DraftSlot]) -> None:
        """Draft for the slots that want tokens."""
        ready = [slot for slot in slots if slot.num_tokens > 0]
        a = self._compute([(slot.request, slot.block_ids, slot.request.num_tokens, 1) for slot in ready])
        for step in range(max((slot.num_tokens for slot in ready), default=0)):
            if step > 0:
                kept = [row for row, slot in enumerate(ready) if slot.num_tokens > step]
                ready = [ready[row] for row in kept]
                batch = build_batch([_last_draft(slot) for slot in ready], self._block_size, self._device)
                a = self._network.forward(batch, a[kept])
            params = [slot.request.sampling for slot in ready]
            positions = [slot.request.num_tokens + step for slot in ready]
            for slot, token in zip(
                ready, self._head.choose(self._network.head_input(a), params, positions), strict=True
            ):
                slot.request.draft_token_ids.append(token)

    @torch.inference_mode()
    def observe(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: torch.Tensor | None
    ) -> None:
        """Take the features of the tokens that turned out right; compute the entries of prompts."""
        assert features is not None
        g = self._network.fuse(features)
        row = 0
        due: list[tuple[Request, Sequence[int], int, int]] = []
        for sequence, kept in zip(sequences, num_kept, strict=True):
            num_known = len(sequence.token_ids) - sequence.num_draft_tokens
            self._append(sequence, g[row : row + num_known + max(kept - 1, 0)])
            row += len(sequence.token_ids)
            if num_known > 1 or kept == 0 or self._pending[sequence.request.request_id].count > MAX_PENDING_TOKENS:
                due.append((sequence.request, sequence.block_ids, sequence.start + num_known, 0))
        self._compute(due)

    def forget(self, request_id: str) -> None:
        """Drop what waits for a request's entries."""
        self._pending.pop(request_id, None)

    def _append(self, sequence: ScheduledSequence, g: torch.Tensor) -> None:
        """g of the positions from ``sequence.start`` on: for the tokens one further."""
        request_id, start = sequence.request.request_id, sequence.start
        pending = self._pending.get(request_id)
        if pending is None:
            pending = self._pending[request_id] = _Pending(start, [self._g_before(sequence)], 1)
        pending.g.append(g)
        pending.count += len(g)
        first_block, end_block = start // self._block_size, (start + len(g)) // self._block_size
        for block in range(first_block, end_block):
            last_row = (block + 1) * self._block_size - 1 - start
            self._last_features[sequence.block_ids[block]] = g[last_row]

    def _g_before(self, sequence: ScheduledSequence) -> torch.Tensor:
        """[1, hidden]: g of the position before a new sequence's first computed token, the end of a cached block."""
        if sequence.start == 0:
            return torch.zeros_like(self._last_features[:1])
        block_id = sequence.block_ids[sequence.start // self._block_size - 1]
        return self._last_features[block_id].clone().unsqueeze(0)

    def _compute(self, wanted: Sequence[tuple[Request, Sequence[int], int, int]]) -> torch.Tensor:
        """Compute the waiting entries of (request, its blocks, end, logits): tokens before position ``end``.

        Returns:
            a of the last token of each that wants logits (1, not 0).
        """
        pieces: list[_Piece] = []
        g: list[torch.Tensor] = []
        for request, block_ids, end, num_logits in wanted:
            pending = self._pending[request.request_id]
            count = end - pending.start
            if count == 0:
                continue
            rows = torch.cat(pending.g)
            g.append(rows[:count])
            pieces.append(_Piece(pending.start, request.all_token_ids[pending.start : end], num_logits, block_ids))
            self._pending[request.request_id] = _Pending(end, [rows[count:]], pending.count - count)
        if not pieces:
            return self._last_features[:0]
        return self._network.forward(build_batch(pieces, self._block_size, self._device), torch.cat(g))


def _last_draft(slot: DraftSlot) -> _Piece:
    drafts = slot.request.draft_token_ids
    return _Piece(slot.request.num_tokens + len(drafts) - 1, drafts[-1:], 1, slot.block_ids)
