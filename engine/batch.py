"""What the model runner hands to the model: one step's ragged batch as flat tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernels.upload import upload


@dataclass(frozen=True)
class ForwardBatch:
    """Tokens of all sequences of one step, laid end to end.

    T tokens, B sequences, L rows whose logits are wanted. Sequence b owns the token rows
    ``query_start_loc[b] : query_start_loc[b + 1]``; they are the *last* of its ``seq_lens[b]``
    tokens of context, so row i of the sequence sees keys 0 .. seq_len - query_len + i.
    All tensors are on the model's device.
    """

    token_ids: torch.Tensor
    """[T] int32"""
    positions: torch.Tensor
    """[T] int32, 0-based position in the sequence"""
    query_start_loc: torch.Tensor
    """[B + 1] int32"""
    seq_lens: torch.Tensor
    """[B] int32, context length including this step's tokens"""
    block_tables: torch.Tensor
    """[B, max_blocks] int32, unused entries 0"""
    slot_mapping: torch.Tensor
    """[T] int32, block * block_size + offset where each token's key and value are written"""
    logits_indices: torch.Tensor
    """[L] int64, rows of T"""
    num_prefilling: int = 0
    """How many sequences, the last ones, compute tokens of prompts: on CPUs with AMX these are rounded otherwise."""
    on_host: ForwardBatch | None = None
    """The same on the CPU, where the model is elsewhere: plans are made of it, so that nobody waits for a copy."""

    @property
    def host(self) -> ForwardBatch:
        """The same on the CPU."""
        return self.on_host or self

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, in order."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def on(self, device: torch.device) -> ForwardBatch:
        """The same on a device; itself on the CPU, where it must be."""
        if device.type == "cpu":
            return self
        uploaded = upload(device, *(tensor.numpy() for tensor in self.tensors.values()))
        placed: dict[str, Any] = dict(zip(self.tensors, uploaded, strict=True))
        return ForwardBatch(**placed, num_prefilling=self.num_prefilling, on_host=self)


@dataclass(frozen=True)
class Features:
    """What a draft sees of a step's T tokens."""

    values: torch.Tensor
    """[T, n * hidden] floating-point: outputs of the n captured layers side by side"""
    slots: torch.Tensor
    """[T] int32, where each token's key and value are"""


@dataclass(frozen=True)
class ForwardOutput:
    """What a model computes for a batch of T tokens."""

    hidden: torch.Tensor
    """[T, hidden] after the final norm, in the model's dtype"""
    features: torch.Tensor | None = None
    """[T, n * hidden]: outputs of the n captured layers side by side, in floating point"""
