"""Paged attention in plain PyTorch: the reference for every other backend, on any device and in any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.batch import ForwardBatch


@dataclass(frozen=True)
class _Group:
    """Sequences of the step with equally many query tokens, attended to together."""

    rows: torch.Tensor
    """[B, Q] int64, rows of T"""
    block_tables: torch.Tensor
    """[B, blocks], as many as the longest context needs"""
    masks: dict[int | None, torch.Tensor]
    """[B, 1, Q, blocks * block_size] bool, True where the query sees the key; for each window that layers have"""


class TorchPagedAttention(AttentionBackend):
    """Gathers each sequence's blocks and calls ``scaled_dot_product_attention``.

    Sequences with equally many query tokens (all plain decodes, above all) go through in one call, padded to
    the longest context among them.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        shape = (spec.num_layers, 2, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        # Zeros, not empty: padding reads block 0, and a NaN there would survive the mask.
        self._cache = torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        self._groups: list[_Group] = []
        self._slot_mapping = torch.empty(0)

    def plan(self, batch: ForwardBatch) -> None:
        self._slot_mapping = batch.slot_mapping.long()
        query_lens = batch.query_start_loc.diff().tolist()
        by_length: dict[int, list[int]] = {}
        for sequence, query_len in enumerate(query_lens):
            by_length.setdefault(query_len, []).append(sequence)
        self._groups = [self._plan_group(batch, sequences, length) for length, sequences in by_length.items()]

    def _plan_group(self, batch: ForwardBatch, sequences: list[int], query_len: int) -> _Group:
        device = self.spec.device
        chosen = torch.tensor(sequences, device=device)
        seq_lens = batch.seq_lens[chosen].long()
        num_blocks = -(-int(seq_lens.max()) // self.spec.block_size)
        offsets = torch.arange(query_len, device=device)
        last_key = (seq_lens - query_len)[:, None] + offsets
        keys = torch.arange(num_blocks * self.spec.block_size, device=device)
        causal = (keys <= last_key[:, :, None]).unsqueeze(1)
        masks: dict[int | None, torch.Tensor] = {None: causal}
        for window in {window for window in self.spec.windows if window is not None}:
            masks[window] = causal & (keys > last_key[:, :, None] - window).unsqueeze(1)
        return _Group(
            rows=batch.query_start_loc[chosen].long()[:, None] + offsets,
            block_tables=batch.block_tables[chosen, :num_blocks].long(),
            masks=masks,
        )

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        (keys, values), window = self._cache[layer], self.spec.window(layer)
        for cached, new in ((keys, k), (values, v)):
            # A freed block keeps what it holds: what is no number would survive the mask of its next owner, too.
            cached.flatten(0, 1)[self._slot_mapping] = new.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        output = torch.empty_like(q)
        for group in self._groups:
            k, v, mask = (*(cached[group.block_tables].flatten(1, 2) for cached in (keys, values)), group.masks[window])
            if sinks is not None:
                k, v = (F.pad(rows, (0, 0, 0, 0, 0, 1)) for rows in (k, v))
                mask = _with_sinks(mask, sinks.to(q.dtype))
            attended = F.scaled_dot_product_attention(
                q[group.rows].transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=mask,
                scale=self.spec.softmax_scale,
                enable_gqa=True,
            )
            output[group.rows] = attended.transpose(1, 2)
        return output


def _with_sinks(mask: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What is added to scores: [B, 1, Q, K] bool → [B, heads, Q, K + 1], the sinks in the last column."""
    added = torch.zeros_like(mask, dtype=sinks.dtype).masked_fill(~mask, -torch.inf)
    added = added.expand(-1, len(sinks), -1, -1)
    return torch.cat((added, sinks[:, None, None].expand(*added.shape[:3], 1)), dim=-1)
