"""What the worker needs of the target: its embedding, head and rotary table. Never its layers."""

from __future__ import annotations

import torch

from adapters.unroll import TargetParts
from engine.models.config import ModelFiles, ModelSpec
from engine.models.llama import RotaryEmbedding
from engine.models.weights import open_weights

_DEFAULT_MAX_MODEL_LEN = 8192


def load_target_parts(files: ModelFiles, spec: ModelSpec, max_model_len: int | None = None) -> TargetParts:
    """Dequantised to bf16 on the CPU; ``max_model_len`` as in the engine's configuration.

    Raises:
        ModelError: a tensor is missing or damaged.
    """
    source = open_weights(files)
    embedding = source.dequantized("model.embed_tokens.weight").bfloat16()
    head = embedding if spec.tie_word_embeddings else source.dequantized("lm_head.weight").bfloat16()
    norm = source.dequantized("model.norm.weight").bfloat16()
    positions = max_model_len or min(spec.max_position_embeddings, _DEFAULT_MAX_MODEL_LEN)
    rotary = RotaryEmbedding(spec, positions, torch.device("cpu"))
    return TargetParts(embedding, head, norm, spec.rms_norm_eps, rotary)
