"""Mistral and Ministral: Llama, with a sliding window where it is set."""

from __future__ import annotations

from dataclasses import replace

from evospec.engine.models.config import LayerSpec, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family, layers_of_types, read_decoder


def _read(config: ConfigKeys) -> ModelSpec:
    config.refuse("attention_bias")
    spec = read_decoder(config)
    window = config.optional("sliding_window", int)
    sliding = LayerSpec(spec.rope, window)
    return replace(spec, layers=layers_of_types(config, spec, sliding, slides=lambda _: window is not None))


def _read_ministral3(config: ConfigKeys) -> ModelSpec:
    """Beyond the context it was trained with at first it scales queries by their position, which is not supported."""
    spec = _read(config)
    rope = config.section("rope_parameters", "rope_scaling")
    if not rope.number("llama_4_scaling_beta", float, 0.0):
        return spec
    original = rope.number("original_max_position_embeddings", int)
    return replace(spec, max_position_embeddings=min(spec.max_position_embeddings, original))


_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
MISTRAL = Family("mistral", _read, defaults={"sliding_window": 4096, **_TOKENS})
"""As GGUF its models are called llama."""
MINISTRAL = Family("ministral", _read, defaults={"sliding_window": 4096, **_TOKENS})
MINISTRAL3 = Family(
    "ministral3",
    _read_ministral3,
    defaults={"head_dim": 128, "rms_norm_eps": 1e-5, **_TOKENS},
    gguf_architecture="mistral3",
    gguf_interleaves_rotary=True,
)
