"""gpt-oss: experts with biases and a clamped SwiGLU, attention sinks, a sliding window in every other layer, YaRN."""

from __future__ import annotations

from dataclasses import replace

from engine.models.config import Experts, LayerSpec, ModelError, ModelSpec
from engine.models.config_keys import ConfigKeys
from engine.models.families.base import FULL, SLIDING, Family, layers_of_types, read_decoder


def _read(config: ConfigKeys) -> ModelSpec:
    for key, value in {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}.items():
        if config.number(key, float, value) != value:
            raise ModelError(f"not supported: {key} = {config.values[key]}")
    spec = read_decoder(config)
    kinds = {FULL: LayerSpec(spec.rope), SLIDING: LayerSpec(spec.rope, config.optional("sliding_window", int))}
    has_bias = config.flag("attention_bias", default=True)
    count = config.number("num_local_experts", int, config.optional("num_experts", int))
    return replace(
        spec,
        layers=layers_of_types(config, kinds, slides=lambda index: index % 2 == 0),
        attention_bias=has_bias,
        output_bias=has_bias,
        attention_sinks=True,
        activation="swiglu_oai",
        experts=Experts(count, config.number("num_experts_per_tok", int), normalized=True, bias=True),
    )


_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_EXPERTS = "mlp.experts."
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
        **{f"mlp.router.{kind}": f"mlp.gate.{kind}" for kind in ("weight", "bias")},
        **{f"{_EXPERTS}{name}": f"{_EXPERTS}{name}.weight" for name in ("gate_up_proj", "down_proj")},
        **{
            f"{_EXPERTS}{name}_{part}": f"{_EXPERTS}{name}.{part}"
            for name in ("gate_up_proj", "down_proj")
            for part in ("bias", "blocks", "scales")
        },
        "self_attn.sinks": "self_attn.sinks.weight",
    },
)
