"""What the model runner hands to the model: one step's ragged batch as flat tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from evospec.kernels.upload import upload


class ForwardBatch(msgspec.Struct, frozen=True):
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
        return {name: value for name, value in msgspec.structs.asdict(self).items() if isinstance(value, torch.Tensor)}

    def on(self, device: torch.device) -> ForwardBatch:
        """The same on a device; itself on the CPU, where it must be."""
        if device.type == "cpu":
            return self
        uploaded = upload(device, *(tensor.numpy() for tensor in self.tensors.values()))
        placed: dict[str, Any] = dict(zip(self.tensors, uploaded, strict=True))
        return ForwardBatch(**placed, num_prefilling=self.num_prefilling, on_host=self)


class FlatTokens(NamedTuple):
    """The tokens of some sequences laid end to end, as the fields of ``ForwardBatch``."""

    token_ids: list[int]
    positions: list[int]
    query_start_loc: list[int]
    seq_lens: list[int]
    block_ids: list[array[int]]
    slot_mapping: list[int]
    logits_indices: list[int]

    def batch(self, block_tables: NDArray[np.int32], num_prefilling: int = 0) -> ForwardBatch:
        """The same on the CPU; ``block_tables`` of ``block_ids``."""

        def tensor(values: list[int], dtype: DTypeLike = np.int32) -> torch.Tensor:
            return torch.from_numpy(np.array(values, dtype))

        return ForwardBatch(
            token_ids=tensor(self.token_ids),
            positions=tensor(self.positions),
            query_start_loc=tensor(self.query_start_loc),
            seq_lens=tensor(self.seq_lens),
            block_tables=torch.from_numpy(block_tables),
            slot_mapping=tensor(self.slot_mapping),
            logits_indices=tensor(self.logits_indices, np.int64),
            num_prefilling=num_prefilling,
        )


def padded_block_tables(block_ids: Sequence[array[int]]) -> NDArray[np.int32]:
    """[B, most blocks of any] int32 of the blocks of B sequences, unused entries 0."""
    num_bytes = max(map(len, block_ids)) * np.dtype(np.int32).itemsize
    tables = bytearray().join([of_sequence.tobytes().ljust(num_bytes, b"\0") for of_sequence in block_ids])
    return np.frombuffer(tables, np.int32).reshape(len(block_ids), -1)


class Features(msgspec.Struct, frozen=True):
    """What a draft sees of a step's T tokens."""

    values: torch.Tensor
    """[T, n * hidden] floating-point: outputs of the n captured layers side by side"""
    slots: torch.Tensor
    """[T] int32, where each token's key and value are"""


class ForwardOutput(msgspec.Struct, frozen=True):
    """What a model computes for a batch of T tokens."""

    hidden: torch.Tensor
    """[T, hidden] after the final norm, in the model's dtype"""
    features: torch.Tensor | None = None
    """[T, n * hidden]: outputs of the n captured layers side by side, in floating point"""
