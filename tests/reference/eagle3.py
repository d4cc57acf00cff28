"""What an EAGLE-3 checkpoint of any project computes, written from their definitions: dense, float32, greedy.

Of token t, from the second on, there is a pair: its embedding, and the target's states before it. Names are those of
the files: nothing is shared with the engine's reader but what a tensor is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Definition:
    """What a draft's files say, and what its project takes for granted."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    inverse_frequencies: torch.Tensor
    """[head_dim / 2]"""
    boundaries: tuple[int, ...]
    """The target's states that are taken: after so many layers"""
    layer: str
    """What the layer's tensors begin with"""
    window: int | None = None
    norm_before_residual: bool = False
    norm_output: bool = False


class ReferenceDraft:
    """Proposes tokens by recomputing everything for each."""

    def __init__(self, definition: Definition, tensors: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]):
        self.definition, self._tensors = definition, {name: tensor.float() for name, tensor in tensors.items()}
        self._embedding = self._tensors.get("embed_tokens.weight", target["model.embed_tokens.weight"].float())
        self._head = tensors.get("lm_head.weight", target["lm_head.weight"]).float()
        offsets = tensors.get("d2t")
        self._offsets = torch.zeros(len(self._head), dtype=torch.long) if offsets is None else offsets.long()

    def chain(self, token_ids: list[int], states: list[torch.Tensor], count: int) -> list[int]:
        """``count`` tokens after the known ones; states[j] [positions, width]: the target's after j layers."""
        features = [states[j][: len(token_ids) - 1].float() for j in self.definition.boundaries]
        g, drafts = self._fuse(features), list[int]()
        while len(drafts) < count:
            out = self._layer(torch.tensor((token_ids + drafts)[1:]), g)
            normed = self._norm("norm.weight", out)
            place = int((normed[-1] @ self._head.T).argmax())
            drafts.append(place + int(self._offsets[place]))
            g = torch.cat((g, normed[-1:] if self.definition.norm_output else out[-1:]))
        return drafts

    def _fuse(self, features: list[torch.Tensor]) -> torch.Tensor:
        if "fc_norm.0.weight" in self._tensors:
            features = [self._norm(f"fc_norm.{index}.weight", one) for index, one in enumerate(features)]
        whole = torch.cat(features, dim=-1)
        if "input_norm.weight" in self._tensors:
            whole = self._norm("input_norm.weight", whole)
        return whole @ self._tensors["fc.weight"].T

    def _layer(self, token_ids: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """[T, hidden] of the pairs of tokens [T] and g [T, hidden]."""
        layer, normed = self.definition.layer, self._norm(self.definition.layer + "hidden_norm.weight", g)
        embedded = self._norm(layer + "input_layernorm.weight", self._embedding[token_ids])
        residual = normed if self.definition.norm_before_residual else g
        residual = residual + self._attend(torch.cat((embedded, normed), dim=-1))
        x = self._norm(layer + "post_attention_layernorm.weight", residual)
        gate, up = (x @ self._tensors[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return residual + (F.silu(gate) * up) @ self._tensors[layer + "mlp.down_proj.weight"].T

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        one, prefix = self.definition, self.definition.layer + "self_attn."
        projected = {}
        for name, count in (("q", one.heads), ("k", one.kv_heads), ("v", one.kv_heads)):
            product = x @ self._tensors[f"{prefix}{name}_proj.weight"].T
            product = product + self._tensors.get(f"{prefix}{name}_proj.bias", 0.0)
            rows = product.view(len(x), count, one.head_dim)
            if f"{prefix}{name}_norm.weight" in self._tensors:
                rows = self._norm(f"{prefix}{name}_norm.weight", rows)
            projected[name] = (rows if name == "v" else self._rotate(rows)).transpose(0, 1)
        group = one.heads // one.kv_heads
        keys, values = (projected[name].repeat_interleave(group, dim=0) for name in "kv")
        scores = projected["q"] @ keys.transpose(1, 2) / math.sqrt(one.head_dim)
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        seen = (distance >= 0) & (distance < (one.window or len(x) + 1))
        attended = scores.masked_fill(~seen, -math.inf).softmax(dim=-1) @ values
        return attended.transpose(0, 1).flatten(1) @ self._tensors[prefix + "o_proj.weight"].T

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(len(rows)).float(), self.definition.inverse_frequencies)
        cos, sin = (torch.cat((part, part), dim=-1)[:, None] for part in (angles.cos(), angles.sin()))
        first, second = rows.chunk(2, dim=-1)
        return rows * cos + torch.cat((-second, first), dim=-1) * sin

    def _norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.definition.eps) * self._tensors[name]
