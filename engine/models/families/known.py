"""The families that can be served, by their names in files. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evospec.engine.models.config import ModelError, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family
from evospec.engine.models.families.gemma3 import GEMMA3
from evospec.engine.models.families.gpt_oss import GPT_OSS
from evospec.engine.models.families.llama import LLAMA
from evospec.engine.models.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from evospec.engine.models.families.phi3 import PHI3
from evospec.engine.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from evospec.engine.models.families.smollm3 import SMOLLM3

FAMILIES = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MINISTRAL, MINISTRAL3, SMOLLM3, PHI3, GEMMA3, GPT_OSS)
BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
BY_GGUF_ARCHITECTURE = {family.gguf_architecture: family for family in FAMILIES if family.gguf_architecture is not None}


def family_of(name: object, families: Mapping[str, Family] = BY_MODEL_TYPE) -> Family:
    """The family of a name; raises ``ModelError`` where none has it."""
    family = families.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelError(f"architecture {name!r} is not supported (supported: {', '.join(families)})")
    return family


def spec_from_config(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> ModelSpec:
    """From a Hugging Face ``config.json`` and ``generation_config.json`` (may be empty).

    Of a model that also reads images it is the part that reads text. Tokens that ``generation_config.json`` names
    count for more than those of ``config.json``.

    Raises:
        ModelError: unsupported family or feature, or a missing or ill-typed entry.
    """
    config = _text_part(config)
    family = family_of(config.get("model_type"))
    tokens = {key: generation_config.get(key) for key in ("bos_token_id", "eos_token_id")}
    named = {key: token for key, token in tokens.items() if token is not None}
    return family.read(ConfigKeys({**family.defaults, **config, **named}))


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the part that reads text, with what counts for the whole model."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    shared = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
    return {**{key: config[key] for key in shared if key in config}, **text}
