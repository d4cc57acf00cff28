"""SmolLM3: Llama, where some layers have no rotary embedding (NoPE); by default each fourth."""

from __future__ import annotations

from dataclasses import replace

from evospec.engine.models.config import LayerSpec, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family, read_decoder


def _read(config: ConfigKeys) -> ModelSpec:
    config.refuse("attention_bias", "use_sliding_window")
    spec = read_decoder(config)
    count = spec.num_layers
    interval = max(config.number("no_rope_layer_interval", int, 4), 1)
    turns = config.items("no_rope_layers", count) or [(index + 1) % interval for index in range(count)]
    return replace(spec, layers=tuple(LayerSpec(spec.rope if turn else None) for turn in turns))


SMOLLM3 = Family(
    "smollm3",
    _read,
    defaults={
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    gguf_architecture="smollm3",
    gguf_interleaves_rotary=True,
)
