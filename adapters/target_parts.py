"""What a draft shares with its target: embedding, head, final norm and rotary table, never the target's layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evospec.engine.config import MAX_SPECULATIVE_TOKENS, ModelConfig
from evospec.engine.models.config import ModelFiles, ModelSpec
from evospec.engine.models.decoder import RotaryEmbedding
from evospec.engine.models.weight_reader import WeightReader
from evospec.engine.models.weights import WeightSource, open_weights
from evospec.kernels.between_products import rms_norm
from evospec.kernels.native import has_fast_bf16


@dataclass(frozen=True)
class TargetParts:
    """Frozen weights of the target, in the dtype that products are computed in."""

    embedding: torch.Tensor  # [vocab, hidden]
    head: torch.Tensor  # [vocab, hidden]
    norm: torch.Tensor  # [hidden] float32, the weight of the final RMSNorm
    norm_eps: float
    rotary: RotaryEmbedding
    embedding_scale: float = 1.0

    @property
    def max_positions(self) -> int:
        """Of a sequence."""
        return len(self.rotary.cos_sin) - MAX_SPECULATIVE_TOKENS

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What a draft reads of tokens [...]: their rows of the embedding [..., hidden], scaled as in the target."""
        rows = F.embedding(token_ids, self.embedding)
        return rows if self.embedding_scale == 1 else rows * self.embedding_scale

    def head_input(self, last_layer: torch.Tensor) -> torch.Tensor:
        """What the head projects, from the output of the last layer."""
        return rms_norm(last_layer, self.norm, self.norm_eps)


def fastest_dtype() -> torch.dtype:
    """That in which this CPU multiplies matrices fastest."""
    return torch.bfloat16 if has_fast_bf16() else torch.float32


def with_others(
    token_ids: torch.Tensor, drawn: torch.Tensor, tile: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Rows of the head for a loss, ascending: all of some ids, and of those drawn as many as fill whole tiles."""
    others = torch.unique(drawn)
    others = others[~torch.isin(others, token_ids)]
    others = others[torch.randperm(len(others), generator=generator)]
    count = len(others) - (len(token_ids) + len(others)) % tile
    return torch.cat((token_ids, others[: max(count, 0)])).sort().values


def load_target_parts(
    files: ModelFiles, spec: ModelSpec, max_model_len: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> TargetParts:
    """Dequantised on the CPU; ``max_model_len`` as in the engine's configuration.

    Raises:
        ModelError: a tensor is missing or damaged, or the model's sequences are not that long.
    """
    positions = ModelConfig(max_model_len=max_model_len).longest_sequence(spec)
    return target_parts(open_weights(files), spec, positions, dtype)


def target_parts(source: WeightSource, spec: ModelSpec, max_positions: int, dtype: torch.dtype) -> TargetParts:
    """Dequantised on the CPU, with the rotary table of an engine for ``max_positions`` positions."""
    reader = WeightReader(source, spec.tensor_shapes(), dtype, torch.device("cpu"), None)
    embedding = reader.rows("model.embed_tokens.weight")
    head = embedding if spec.tie_word_embeddings else reader.rows("lm_head.weight")
    norm = source.dequantized("model.norm.weight")
    # A chain that starts at the last position of the context goes on beyond it: what it gives there counts for nothing.
    rotary = RotaryEmbedding(spec.rope, max_positions, torch.device("cpu"), beyond=MAX_SPECULATIVE_TOKENS)
    return TargetParts(embedding, head, norm, spec.rms_norm_eps, rotary, spec.embedding_scale)
