"""Attention of the compiled CPU kernels: bf16 keys and values, read where they lie."""

from __future__ import annotations

import torch

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.batch import ForwardBatch
from evospec.kernels.native import Team
from evospec.kernels.native_decoder import BatchView, KvCache, paged_attention


class NativeAttention(AttentionBackend):
    """Owns the KV cache of the compiled kernels; ``engine.models.native_decoder`` attends over it inside its layers."""

    def __init__(self, spec: AttentionSpec, team: Team) -> None:
        super().__init__(spec)
        self.team = team
        self.cache = KvCache(spec.num_layers, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)

    def plan(self, batch: ForwardBatch) -> None:
        self.batch = BatchView(
            batch.positions,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_tables,
            batch.slot_mapping,
            batch.num_prefilling,
        )

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = q.float(), k.float(), v.float()
        scale, window = self.spec.softmax_scale, self.spec.window(layer)
        return paged_attention(self.team, self.batch, self.cache, layer, *rows, scale, window, sinks).to(q.dtype)
