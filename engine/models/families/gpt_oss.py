"""gpt-oss: experts with biases and a clamped SwiGLU, attention sinks, a sliding window in every other layer, YaRN."""

from __future__ import annotations

from dataclasses import replace

from evospec.engine.models.config import Experts, LayerSpec, ModelError, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family, layers_of_types, read_decoder


def _read(config: ConfigKeys) -> ModelSpec:
    for key, value in {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}.items():
        if config.number(key, float, value) != value:
            raise ModelError(f"not supported: {key} = {config.values[key]}")
    spec = read_decoder(config)
    sliding = LayerSpec(spec.rope, config.optional("sliding_window", int))
    has_bias = config.flag("attention_bias", default=True)
    count = config.number("num_local_experts", int, config.optional("num_experts", int))
    return replace(
        spec,
        layers=layers_of_types(config, spec, sliding, slides=lambda index: index % 2 == 0),
        attention_bias=has_bias,
        output_bias=has_bias,
        attention_sinks=True,
        activation="swiglu_oai",
        experts=Experts(count, config.number("num_experts_per_tok", int), normalized=True, bias=True),
    )


_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
GPT_OSS = Family(
    "gpt_oss",
    _read,
    defaults={
        "vocab_size": 201_088,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": _YARN,
        "sliding_window": 128,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131_072,
    },
    gguf_architecture="gpt-oss",
    gguf_defaults=lambda config: {"rope_scaling": {**config.section("rope_scaling").values, "truncate": False}},
    alternates_experts=True,
    names={
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.router.bias": "mlp.gate.bias",
        "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj.weight",
        "mlp.experts.gate_up_proj_bias": "mlp.experts.gate_up_proj.bias",
        "mlp.experts.gate_up_proj_blocks": "mlp.experts.gate_up_proj.blocks",
        "mlp.experts.gate_up_proj_scales": "mlp.experts.gate_up_proj.scales",
        "mlp.experts.down_proj": "mlp.experts.down_proj.weight",
        "mlp.experts.down_proj_bias": "mlp.experts.down_proj.bias",
        "mlp.experts.down_proj_blocks": "mlp.experts.down_proj.blocks",
        "mlp.experts.down_proj_scales": "mlp.experts.down_proj.scales",
        "self_attn.sinks": "self_attn.sinks.weight",
    },
)
