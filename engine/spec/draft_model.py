"""Drafting by a smaller model with the same tokens (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.attention.base import AttentionBackend, AttentionSpec
from engine.config import CacheConfig
from engine.loader import LoadedModel
from engine.model_runner import attention_spec, build_batch
from engine.scheduler import DraftSlot, ScheduledSequence
from engine.spec.draft_head import DraftHead
from engine.spec.proposer import DraftCosts, Proposer

MAX_CATCH_UP_TOKENS = 512
"""Most tokens that one call of ``propose`` computes because the draft had not seen them; the rest waits a step."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one sequence that the draft computes; a ``BatchSequence``."""

    start: int
    token_ids: list[int]
    num_logits: int
    block_ids: Sequence[int]


class DraftModel:
    """A loaded draft model."""

    capture_layers = ()

    def __init__(self, loaded: LoadedModel, name: str, cache: CacheConfig, head: DraftHead) -> None:
        self._loaded, self._cache, self._head = loaded, cache, head
        self.description = f"draft model {name}, vocabulary {head.description}"
        self.costs = DraftCosts(loaded.model.weight_bytes + head.num_bytes, self._attention_spec(1).bytes_per_block)

    def make_proposer(self, num_blocks: int) -> Proposer:
        """Allocate KV for blocks 0 .. num_blocks - 1."""
        attention = self._loaded.make_attention(self._attention_spec(num_blocks))
        return DraftModelProposer(self._loaded, attention, self._head)

    def _attention_spec(self, num_blocks: int) -> AttentionSpec:
        return attention_spec(self._loaded, self._cache, num_blocks)


class DraftModelProposer:
    """Runs the draft model on what it has not seen of a sequence, then token by token.

    It computes nothing before a sequence is drafted for, not even its prompt: while speculation does not pay, the
    draft costs nothing. A sequence with more than ``MAX_CATCH_UP_TOKENS`` unseen tokens gets its first draft some
    steps later. Full blocks remember whether their entries were computed, so that no cached prefix is computed again.
    """

    capture_layers: tuple[int, ...] = ()

    def __init__(self, loaded: LoadedModel, attention: AttentionBackend, head: DraftHead) -> None:
        self._loaded, self._attention, self._head = loaded, attention, head
        self._block_size = attention.spec.block_size
        self._complete = bytearray(attention.spec.num_blocks)
        """For each block: whether all its entries were computed since the target last wrote to it."""
        self._num_computed: dict[str, int] = {}
        """For each request: how many of its first tokens have an entry."""

    @torch.inference_mode()
    def propose(self, slots: Sequence[DraftSlot]) -> None:
        """Draft for the slots that want tokens and whose entries are, or can be brought, up to date."""
        pieces, ready = self._catch_up([slot for slot in slots if slot.num_tokens > 0])
        if not pieces:
            return
        hidden = self._forward(pieces)
        for step in range(max((slot.num_tokens for slot in ready), default=0)):
            if step > 0:
                ready = [slot for slot in ready if slot.num_tokens > step]
                hidden = self._forward([_last_draft(slot) for slot in ready])
            params = [slot.request.sampling for slot in ready]
            positions = [slot.request.num_tokens + step for slot in ready]
            for slot, token_id in zip(ready, self._head.choose(hidden, params, positions), strict=True):
                slot.request.draft_token_ids.append(token_id)

    def observe(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: torch.Tensor | None
    ) -> None:
        """Count the entries of accepted drafts as computed; new tokens are computed by a later ``propose``."""
        for sequence, kept in zip(sequences, num_kept, strict=True):
            request_id, start = sequence.request.request_id, sequence.start
            num_computed = self._num_computed.get(request_id)
            if num_computed is None:
                num_computed = self._cached_tokens(sequence)
            end = start + len(sequence.token_ids)
            for block_id in sequence.block_ids[start // self._block_size : -(-end // self._block_size)]:
                self._complete[block_id] = False
            # The last draft was never an input, so it has no entry.
            if num_computed == end - sequence.num_draft_tokens and kept > 1:
                num_computed += min(kept - 1, sequence.num_draft_tokens - 1)
            self._set_computed(request_id, sequence.block_ids, start, num_computed)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request."""
        self._num_computed.pop(request_id, None)

    def _catch_up(self, slots: Sequence[DraftSlot]) -> tuple[list[_Piece], list[DraftSlot]]:
        """The unseen tokens to compute now, and the slots that they bring up to date, in the same order."""
        budget = MAX_CATCH_UP_TOKENS
        pieces: list[_Piece] = []
        ready: list[DraftSlot] = []
        for slot in sorted(slots, key=self._num_unseen):
            token_ids, request_id = slot.request.all_token_ids, slot.request.request_id
            start = self._num_computed[request_id]
            end = min(len(token_ids), start + budget)
            if end == start:
                break
            budget -= end - start
            is_ready = end == len(token_ids)
            pieces.append(_Piece(start, token_ids[start:end], int(is_ready), slot.block_ids))
            self._set_computed(request_id, slot.block_ids, start, end)
            if is_ready:
                ready.append(slot)
        return pieces, ready

    def _num_unseen(self, slot: DraftSlot) -> int:
        return slot.request.num_tokens - self._num_computed[slot.request.request_id]

    def _forward(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        """Hidden states [n, hidden] of the last token of each piece that wants logits."""
        batch = build_batch(pieces, self._block_size, self._loaded.device)
        return self._loaded.model.forward(batch, self._attention).hidden[batch.logits_indices]

    def _cached_tokens(self, sequence: ScheduledSequence) -> int:
        """Tokens of a new sequence's cached prefix whose entries are there too."""
        cached = sequence.block_ids[: sequence.start // self._block_size]
        complete = [bool(self._complete[block_id]) for block_id in cached]
        return self._block_size * ([*complete, False].index(False))

    def _set_computed(self, request_id: str, block_ids: Sequence[int], start: int, num_computed: int) -> None:
        """All tokens before ``num_computed`` have entries now; before ``start`` nothing has changed."""
        self._num_computed[request_id] = num_computed
        for block_id in block_ids[start // self._block_size : num_computed // self._block_size]:
            self._complete[block_id] = True


def _last_draft(slot: DraftSlot) -> _Piece:
    drafts = slot.request.draft_token_ids
    return _Piece(slot.request.num_tokens + len(drafts) - 1, drafts[-1:], 1, slot.block_ids)
