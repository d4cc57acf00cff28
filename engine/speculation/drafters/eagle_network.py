"""The arithmetic of an EAGLE-3 draft, its layer and its head, in plain PyTorch or on the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Mapping

import gguf.quants
import numpy as np
import structlog
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType

from engine.attention.base import AttentionBackend
from engine.batch import Features, ForwardBatch
from engine.loader import LoadedModel
from engine.models.decoder import HeadSlab, RotaryEmbedding
from engine.models.eagle3 import Eagle3
from engine.models.eagle3_weights import DraftRows
from engine.models.native_eagle3 import NativeEagle3, unsupported_draft
from kernels.batched_lora import LoraRows
from kernels.native import MatrixPart, PackedMatrix, Team, linear
from kernels.native_decoder import unpack_rows

log = structlog.get_logger(__name__)

_HEAD_TYPE = GGMLQuantizationType.Q8_0


class TorchEagleNetwork:
    """Of torch operations: any device, any dtype. ``attention`` is the target's kind of backend, with one layer."""

    def __init__(self, draft: Eagle3, rotary: RotaryEmbedding) -> None:
        self._draft, self._rotary = draft, rotary
        self._dtype = draft.fc.weight.dtype
        self.shift = 0 if draft.config.variant.first_token_has_entry else 1
        """A token's entry lies so many places before the token's own."""
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in draft.parameters())

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put other weights, by their names in ``Eagle3``, in place of all that there are. Between forward passes."""
        for name, weight in self._draft.named_parameters():
            weight.copy_(weights[name])

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features [T, n * hidden] → g [T, hidden]."""
        return self._draft.fuse(features.to(self._dtype))

    def fuse_into(self, store: torch.Tensor, features: Features) -> None:
        """Write g of each token to its slot's row of ``store`` [slots, hidden], which is of the target's dtype."""
        store.index_copy_(0, features.slots.long(), self.fuse(features.values).to(store.dtype))

    def forward(
        self,
        batch: ForwardBatch,
        attention: AttentionBackend,
        embeddings: torch.Tensor,
        g: torch.Tensor,
        lora: LoraRows | None = None,
    ) -> torch.Tensor:
        """Write the entries of a ragged batch's tokens.

        Args:
            batch: their positions and slots.
            attention: owns the entries.
            embeddings: [T, hidden], the tokens' rows of the target's embedding.
            g: [T, hidden], of the position before each token: fused features, or the last step's result.
            lora: what the tokens' products with the layer's matrices gain; None: nothing.

        Returns:
            a [L, hidden] of the rows ``batch.logits_indices``: g of the next token.
        """
        attention.plan(batch)
        q, k, v = self._draft.qkv(embeddings.to(self._dtype), g, lora)
        attended = attention.forward(0, self._rotary(q, batch.positions), self._rotary(k, batch.positions), v)
        wanted = batch.logits_indices
        return self._draft.output(g[wanted], attended[wanted], None if lora is None else lora.of(wanted))

    def head_input(self, a: torch.Tensor) -> torch.Tensor:
        """[L, hidden] → what the head projects, [L, hidden]."""
        return self._draft.head_input(a)


EagleNetwork = TorchEagleNetwork | NativeEagle3


def make_network(draft: Eagle3, target: LoadedModel, embedding: torch.Tensor | None = None) -> EagleNetwork:
    """The fastest network for a draft, with its own ``embedding`` [vocab, hidden] (None: it has the target's)."""
    if target.team is not None:
        reason = unsupported_draft(draft.config)
        if reason is None:
            return NativeEagle3(draft, target.spec, target.team, target.max_model_len, target.digits, embedding)
        log.warning("the draft runs on slower torch operations", reason=reason)
    rope = draft.config.variant.rope or target.spec.rope
    return TorchEagleNetwork(draft, RotaryEmbedding(rope, target.max_model_len, target.device))


class OwnHead:
    """The output projection of a draft that has its own: its rows, and which of the target's tokens they are.

    With the compiled kernels they are rounded to 8 bits, which can cost acceptance only.

    Args:
        weights: the rows.
        target: whose vocabulary they are of.
    """

    def __init__(self, weights: DraftRows, target: LoadedModel) -> None:
        self.token_ids = weights.token_ids
        """[K] int64 on the CPU, ascending"""
        self._team = target.team
        row_of = torch.full((target.spec.vocab_size,), -1, dtype=torch.int32)
        row_of[self.token_ids] = torch.arange(len(self.token_ids), dtype=torch.int32)
        self.row_of = row_of.to(target.device)
        """[vocab] int32: the row of each token; -1: it has none"""
        if target.team is None or weights.rows.shape[1] % 32:
            rows = weights.rows
            self.slab = HeadSlab(lambda x: F.linear(x.to(rows.dtype), rows).float(), rows.nbytes, rows)
        else:
            self.slab = _packed_head(weights.rows, target.team, target.digits)

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """One logit for each row of hidden [n, hidden] and token [n]: [n] float32, NaN for a token without a row."""
        places = self.row_of[token_ids.long()]
        if self.slab.rows is not None:
            rows = self.slab.rows[places.clamp(min=0).long()]
        else:
            assert self.slab.packed is not None
            assert self._team is not None
            rows = unpack_rows(self._team, self.slab.packed, places.clamp(min=0))
        logits = (rows.float() * hidden.float()).sum(dim=1)
        return logits.masked_fill(places < 0, float("nan"))


def _packed_head(rows: torch.Tensor, team: Team, digits: int) -> HeadSlab:
    blocks = gguf.quants.quantize(rows.float().numpy(), _HEAD_TYPE)
    part = MatrixPart(np.arange(len(rows)), int(_HEAD_TYPE), blocks=blocks)
    packed = PackedMatrix(len(rows), rows.shape[1], [part], None, digits)
    return HeadSlab(lambda x: linear(team, packed, x), packed.num_bytes, packed=packed)
