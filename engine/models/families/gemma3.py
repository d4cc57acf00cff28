"""Gemma 3 (text): four norms a layer, norms of queries and keys, a sliding window in five layers of six."""

from __future__ import annotations

from dataclasses import replace

from evospec.engine.models.config import LayerSpec, ModelError, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import FULL, SLIDING, Family, layers_of_types, read_decoder
from evospec.engine.models.rope_scaling import read_rope


def _read(config: ConfigKeys) -> ModelSpec:
    config.refuse("attention_bias", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    ropes = config.section("rope_parameters")  # for each type of layer; in older files rope_scaling, for full attention
    scaling = ropes.section(FULL) if ropes.values else config.section("rope_scaling")
    spec = read_decoder(ConfigKeys({**config.values, "rope_parameters": scaling.values}), "hidden_activation")
    local = read_rope(config, ropes.section(SLIDING), spec.head_dim, 10_000.0, "rope_local_base_freq")
    sliding = LayerSpec(local, config.optional("sliding_window", int))
    pattern = max(config.number("sliding_window_pattern", int, 6), 1)
    query_scalar = config.number("query_pre_attn_scalar", float, spec.head_dim)
    if query_scalar <= 0:
        raise ModelError(f"query_pre_attn_scalar is {query_scalar}, must be positive")
    return replace(
        spec,
        layers=layers_of_types(config, spec, sliding, slides=lambda index: (index + 1) % pattern != 0),
        attention_scale=query_scalar**-0.5,
        embedding_scale=spec.hidden_size**0.5,
        qk_norm=True,
        output_norms=True,
    )


def _left_out_of_gguf(config: ConfigKeys) -> dict[str, float]:
    """The largest model (27B) is told by its layers, as in llama.cpp."""
    is_largest = config.number("num_hidden_layers", int) == 62
    heads = max(config.number("num_attention_heads", int), 1)
    width = config.number("hidden_size", int) / heads if is_largest else config.number("head_dim", int)
    return {"query_pre_attn_scalar": width}


GEMMA3 = Family(
    "gemma3_text",
    _read,
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    gguf_architecture="gemma3",
    gguf_defaults=_left_out_of_gguf,
    norm_offset=1.0,
)
