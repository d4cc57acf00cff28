"""What the worker needs of the target: its embedding, head and rotary table. Never its layers."""

from __future__ import annotations

import torch

from adapters.unroll import TargetParts
from engine.config import MAX_SPECULATIVE_TOKENS
from engine.models.config import ModelFiles, ModelSpec
from engine.models.llama import RotaryEmbedding
from engine.models.weights import WeightSource, open_weights

_DEFAULT_MAX_MODEL_LEN = 8192


def load_target_parts(files: ModelFiles, spec: ModelSpec, max_model_len: int | None = None) -> TargetParts:
    """Dequantised to bf16 on the CPU; ``max_model_len`` as in the engine's configuration.

    Raises:
        ModelError: a tensor is missing or damaged.
    """
    positions = max_model_len or min(spec.max_position_embeddings, _DEFAULT_MAX_MODEL_LEN)
    # A chain that starts at the last position of the context goes on beyond it: what it gives there counts for nothing.
    positions += MAX_SPECULATIVE_TOKENS
    return target_parts(open_weights(files), spec, positions, torch.bfloat16)


def target_parts(source: WeightSource, spec: ModelSpec, max_positions: int, dtype: torch.dtype) -> TargetParts:
    """Dequantised on the CPU; a rotary table for so many positions."""
    embedding = source.dequantized("model.embed_tokens.weight").to(dtype)
    head = embedding if spec.tie_word_embeddings else source.dequantized("lm_head.weight").to(dtype)
    norm = source.dequantized("model.norm.weight").to(dtype)
    rotary = RotaryEmbedding(spec, max_positions, torch.device("cpu"))
    return TargetParts(embedding, head, norm, spec.rms_norm_eps, rotary)
