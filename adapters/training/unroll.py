"""The draft's forward pass in training: every position unrolled over several steps at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from adapters.target_parts import TargetParts
from adapters.training.chain_attention import chain_attention
from adapters.training.dataset import Batch
from adapters.training.head_loss import head_loss
from engine.models.eagle3 import Eagle3


class Unroller:
    """Runs a draft over a batch.

    Args:
        draft: float32 master weights.
        target: its frozen parts.
        feature_scale: [n * hidden], multiplies the features; ``fc`` is trained behind it and must be folded with it
            afterwards (``folded_fc``). The target's features differ in size by orders of magnitude from one dimension
            to the next, which Adam's equal steps cannot cope with.
    """

    def __init__(self, draft: Eagle3, target: TargetParts, feature_scale: torch.Tensor) -> None:
        self.draft, self.target, self._scale = draft, target, feature_scale
        with torch.no_grad():
            draft.fc.weight.div_(feature_scale)

    def precision(self) -> torch.autocast:
        """Products are made in the dtype of the target's head."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.target.head.dtype == torch.bfloat16)

    def folded_fc(self) -> torch.Tensor:
        """``fc``'s weight for features as they are."""
        return self.draft.fc.weight.detach() * self._scale

    def steps(self, batch: Batch, num_steps: int, further: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The head's input [B, T, hidden] of every unrolled step in turn.

        ``further``: numbers of the windows that go on after the first step, B in the later results; None: all do.
        """
        dtype = self.target.head.dtype
        g = self.draft.fuse(batch.features.to(dtype) * self._scale.to(dtype))
        return self.unroll(g, batch.token_ids, batch.positions, num_steps, further)

    def unroll(
        self,
        g: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        num_steps: int,
        further: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """As ``steps``, from fused features g [B, T, hidden] and the tokens and positions of a ``Batch``."""
        length = positions.shape[1]
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for step in range(num_steps):
            if step == 1 and further is not None:
                g, token_ids, positions = g[further], token_ids[further], positions[further]
                keys, values = [keys[0][further]], [values[0][further]]
            embedding = F.embedding(token_ids[:, step : step + length], self.target.embedding)
            q, k, v = self.draft.qkv(embedding, g)
            here = positions + step
            queries, key = self._heads(self._rotate(q, here)), self._heads(self._rotate(k, here))
            keys.append(key)
            values.append(self._heads(v))
            attended = chain_attention(queries, keys[0], values[0], keys[1:], values[1:])
            g = self.draft.output(g, attended.transpose(1, 2))
            yield self.draft.head_input(g)

    def loss(
        self, batch: Batch, rows: torch.Tensor, step_weights: tuple[float, ...]
    ) -> tuple[torch.Tensor, list[float]]:
        """Mean loss an anchor, weighted over the steps; and each step's own mean.

        Only a random half of the windows goes on after the first step, which saves a third of the time and more: a
        token is the label of as many steps as there are, and what they teach is much the same (PARD, arXiv 2504.18583).
        """
        total = torch.zeros(())
        means = []
        length = batch.positions.shape[1]
        further = torch.randperm(len(batch.positions))[: -(-len(batch.positions) // 2)]
        for step, hidden in enumerate(self.steps(batch, len(step_weights), further)):
            if step == 1:
                batch = batch.of(further)
            anchors = batch.anchors(step)
            label = self.target.head_input(batch.labels[:, step : step + length][anchors].to(rows.dtype))
            loss = head_loss(hidden[anchors].to(rows.dtype), label, rows) / max(1, len(label))
            total = total + step_weights[step] / sum(step_weights) * loss
            means.append(float(loss.detach()))
        return total, means

    def _rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.target.rotary(heads.flatten(0, 1), positions.flatten()).view_as(heads)

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, T, heads, dim] → [B, all query heads, T, dim]."""
        repeats = self.draft.config.num_heads // tensor.shape[2]
        return tensor.repeat_interleave(repeats, dim=2).transpose(1, 2).contiguous()
