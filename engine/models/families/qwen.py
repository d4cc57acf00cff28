"""Qwen2 and 2.5: biases of queries, keys and values. Qwen3: norms of queries and keys instead, heads of any width; as a
mixture of experts (Qwen3-MoE), too."""

from __future__ import annotations

from dataclasses import replace

from evospec.engine.models.config import Experts, LayerSpec, ModelError, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family, layers_of_types, read_decoder


def _read_qwen2(config: ConfigKeys) -> ModelSpec:
    spec = read_decoder(config)
    return replace(spec, attention_bias=True, layers=_layers(config, spec))


def _read_qwen3(config: ConfigKeys) -> ModelSpec:
    config.refuse("attention_bias")
    spec = read_decoder(config)
    return replace(spec, qk_norm=True, layers=_layers(config, spec))


def _read_qwen3_moe(config: ConfigKeys) -> ModelSpec:
    config.refuse("mlp_only_layers")
    if config.number("decoder_sparse_step", int, 1) != 1:
        raise ModelError("not supported: layers with an MLP beside layers with experts (decoder_sparse_step)")
    experts = Experts(
        count=config.number("num_experts", int, config.optional("num_local_experts", int)),
        per_token=config.number("num_experts_per_tok", int),
        normalized=config.flag("norm_topk_prob"),
    )
    return replace(_read_qwen3(config), experts=experts, intermediate_size=config.size("moe_intermediate_size"))


def _layers(config: ConfigKeys, spec: ModelSpec) -> tuple[LayerSpec, ...]:
    """With ``use_sliding_window`` the layers from ``max_window_layers`` on have a window."""
    window = config.optional("sliding_window", int) if config.flag("use_sliding_window") else None
    sliding, first = LayerSpec(spec.rope, window), config.number("max_window_layers", int, 28)
    return layers_of_types(config, spec, sliding, slides=lambda index: window is not None and index >= first)


QWEN2 = Family("qwen2", _read_qwen2, defaults={"sliding_window": 4096}, gguf_architecture="qwen2")
QWEN3_MOE = Family(
    "qwen3_moe",
    _read_qwen3_moe,
    defaults={"sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    gguf_architecture="qwen3moe",
    gguf_defaults=lambda _: {"norm_topk_prob": True},
)
QWEN3 = Family("qwen3", _read_qwen3, defaults={"sliding_window": 4096, "head_dim": 128}, gguf_architecture="qwen3")
