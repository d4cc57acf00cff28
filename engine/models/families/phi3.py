"""Phi-3, 3.5 and 4 (the dense text models): fused matrices, heads of which a part turns, LongRoPE."""

from __future__ import annotations

from dataclasses import replace

from evospec.engine.models.config import LayerSpec, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family, read_decoder


def _read(config: ConfigKeys) -> ModelSpec:
    spec = read_decoder(_with_current_names(config))
    return replace(spec, layers=(LayerSpec(spec.rope, config.optional("sliding_window", int)),) * spec.num_layers)


def _with_current_names(config: ConfigKeys) -> ConfigKeys:
    """LongRoPE was called "su" at first, and "yarn" for a while."""
    scaling = config.section("rope_parameters", "rope_scaling").values
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("su", "yarn"):
        return config
    return ConfigKeys({**config.values, "rope_parameters": {**scaling, "rope_type": "longrope"}})


PHI3 = Family(
    "phi3",
    _read,
    defaults={
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
    },
    gguf_architecture="phi3",
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
