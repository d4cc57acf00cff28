"""Llama 2 and 3, SmolLM2, and what else has their shape. Other families are Llama with something replaced."""

from __future__ import annotations

from evospec.engine.models.config import ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family, read_decoder


def _read(config: ConfigKeys) -> ModelSpec:
    config.refuse("attention_bias", "use_sliding_window")
    return read_decoder(config)


LLAMA = Family(
    "llama",
    _read,
    defaults={"bos_token_id": 1, "eos_token_id": 2},
    gguf_architecture="llama",
    gguf_interleaves_rotary=True,
)
