"""Qwen2 and 2.5: biases of queries, keys and values. Qwen3: norms of queries and keys instead, heads of any width."""

from __future__ import annotations

from dataclasses import replace

from engine.models.config import LayerSpec, ModelSpec
from engine.models.config_keys import ConfigKeys
from engine.models.families.base import FULL, SLIDING, Family, layers_of_types, read_decoder


def _read_qwen2(config: ConfigKeys) -> ModelSpec:
    spec = read_decoder(config)
    return replace(spec, attention_bias=True, layers=_layers(config, spec))


def _read_qwen3(config: ConfigKeys) -> ModelSpec:
    config.refuse("attention_bias")
    spec = read_decoder(config)
    return replace(spec, qk_norm=True, layers=_layers(config, spec))


def _layers(config: ConfigKeys, spec: ModelSpec) -> tuple[LayerSpec, ...]:
    """With ``use_sliding_window`` the layers from ``max_window_layers`` on have a window."""
    window = config.optional("sliding_window", int) if config.flag("use_sliding_window") else None
    kinds = {FULL: LayerSpec(spec.rope), SLIDING: LayerSpec(spec.rope, window)}
    first = config.number("max_window_layers", int, 28)
    return layers_of_types(config, kinds, slides=lambda index: window is not None and index >= first)


QWEN2 = Family("qwen2", _read_qwen2, defaults={"sliding_window": 4096}, gguf_architecture="qwen2")
QWEN3 = Family("qwen3", _read_qwen3, defaults={"sliding_window": 4096, "head_dim": 128}, gguf_architecture="qwen3")
