"""What one rank of several has of a decoder: heads, parts of MLPs, and rows of the embedding and of the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.models.decoder import TorchDecoder
from engine.tensor_parallel.ranks import Ranks


@dataclass(frozen=True)
class DecoderShare(TorchDecoder):
    """As the whole model, but each method is called by all ranks at once, and logits are whole at rank 0 only.

    ``embed_tokens`` and ``lm_head`` are this rank's rows of them, for its share of the vocabulary.
    """

    ranks: Ranks

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._rows(self.embed_tokens, token_ids) * self.spec.embedding_scale

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.lm_head).float()
        lacking = -(-self.spec.vocab_size // self.ranks.size) - logits.shape[1]
        return self.ranks.gather(F.pad(logits, (0, lacking)))[:, : self.spec.vocab_size]

    @torch.inference_mode()
    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._rows(self.lm_head, token_ids)

    def _rows(self, matrix: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """[n, hidden]: each rank adds those that it has."""
        places = token_ids.long() - self.ranks.share(self.spec.vocab_size).start
        is_elsewhere = (places < 0) | (places >= len(matrix))
        rows = F.embedding(places.masked_fill(is_elsewhere, 0), matrix)
        return self.ranks.sum(rows.masked_fill(is_elsewhere[:, None], 0))
