"""The arithmetic of an EAGLE-3 draft's layer, in plain PyTorch or on the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
import torch

from evospec.engine.attention.base import AttentionBackend
from evospec.engine.batch import Features, ForwardBatch
from evospec.engine.loader import LoadedModel
from evospec.engine.models.decoder import RotaryEmbedding
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.native_eagle3 import NativeEagle3, unsupported_draft
from evospec.kernels.batched_lora import LoraRows
from evospec.kernels.heads import Rotation

log = structlog.get_logger(__name__)


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
        rotation = Rotation(self._rotary.cos_sin, batch.positions)
        attended = attention.forward(0, *self._draft.qkv(embeddings.to(self._dtype), g, lora, rotation))
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
