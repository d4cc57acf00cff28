"""The interface every attention backend implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from evospec.engine.batch import ForwardBatch


@dataclass(frozen=True)
class AttentionSpec:
    """Shape of the paged KV cache. Head counts and ``head_dim`` are the model's own."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    scale: float | None = None
    """Of the products of queries and keys; None: head_dim ** -0.5"""
    windows: tuple[int | None, ...] = ()
    """Of each layer: how many tokens are attended to, the token itself included; None: all. Empty: all in all layers"""

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values of one block over all layers."""
        element = torch.empty((), dtype=self.dtype).element_size()
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.block_size * element


class AttentionBackend(ABC):
    """Owns the paged KV cache, in the layout it wants, and attends over it.

    Use: construct once with an ``AttentionSpec`` (allocates the cache), then for every step
    ``plan(batch)`` once and ``forward(layer, q, k, v)`` for each layer in order.
    Attention is causal, in layers with a window to the last tokens only.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @abstractmethod
    def plan(self, batch: ForwardBatch) -> None:
        """Prepare for a step; the batch's tensors stay unchanged until the next call."""

    @abstractmethod
    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Write this step's keys and values, then attend.

        Args:
            layer: 0-based layer number.
            q: [T, num_heads, head_dim], rotary already applied.
            k: [T, num_kv_heads, head_dim], rotary already applied.
            v: [T, num_kv_heads, head_dim].
            sinks: [num_heads], for each head the score of one more key, whose value is zero; None: there is none.

        Returns:
            [T, num_heads, head_dim], dtype of q.
        """

    def fixed(self, num_tokens: int, max_blocks: int) -> AttentionBackend:
        """The same cache, for steps of exactly so many tokens and as many sequences, of up to ``max_blocks`` each.

        It reads its plan from memory that stays where it is, so that a CUDA graph of its ``forward`` can be replayed
        after each ``plan``.

        Raises:
            NotImplementedError: by default: this backend has no such form.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be part of a CUDA graph")
