"""``ModelSpec`` and tensor names of a GGUF file. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf.tensor_mapping import get_tensor_name_map

from evospec.engine.models.config import ModelError, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import FULL, SLIDING, Family
from evospec.engine.models.families.known import BY_GGUF_ARCHITECTURE, family_of, spec_from_config
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.models.stored_tensors import stored_shapes

_TYPES = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
_TYPES |= {"IQ4_NL", "IQ4_XS", "MXFP4"}
"""Of tensors, those that are supported."""
CONTROL_TOKEN = 3
_END_TOKENS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"})
_END_TOKENS |= {"<end_of_turn>", "<|end|>"}
_HARMONY_END_TOKENS = _END_TOKENS - {"<|end|>"} | {"<|return|>", "<|call|>"}
"""Of gpt-oss, where <|end|> comes after each of an answer's messages, and only the last ends with <|return|>"""
_NONE_SAYS_NONE = {"sliding_window", "bos_token_id"}
"""What there is not where a GGUF file does not say it, whatever the family has by default."""
_FACTORS, _SHORT_FACTORS, _LONG_FACTORS = (f"rope_{kind}.weight" for kind in ("freqs", "factors_short", "factors_long"))
_ARCHITECTURES: dict[str | None, MODEL_ARCH] = {name: one for one, name in MODEL_ARCH_NAMES.items()}


def gguf_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """How a GGUF file calls its tensors, by their Hugging Face names, which end in .weight or .bias."""
    architecture = _ARCHITECTURES[family_of(spec.architecture).gguf_architecture]
    names = get_tensor_name_map(architecture, spec.num_layers)
    return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in stored_shapes(spec, True)}


def spec_from_gguf(file: GGUFFile) -> ModelSpec:
    """Read the metadata and check that every tensor the model needs is there, in shape and in a known type.

    Raises:
        ModelError: unsupported architecture, feature or tensor type; missing or ill-shaped tensor.
    """
    try:
        family = family_of(file.get("general.architecture", str), BY_GGUF_ARCHITECTURE)
        spec = spec_from_config(_config(file, family), {})
        if spec.experts is None and (file.get(f"{family.gguf_architecture}.expert_count", int) or 0) > 0:
            raise ModelError(f"mixtures of experts are not supported with architecture {family.gguf_architecture!r}")
        _check_tensors(file, spec)
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from None
    return spec


def _end_of_generation_ids(file: GGUFFile) -> list[int]:
    """Ids that end a generation: the file's EOS, EOT and EOM, and the usual end-of-turn control tokens it contains."""
    named = [file.get(f"tokenizer.ggml.{kind}_token_id", int) for kind in ("eos", "eot", "eom")]
    types = file.get_list("tokenizer.ggml.token_type", int)
    tokens = file.get_list("tokenizer.ggml.tokens", str)
    ends = _HARMONY_END_TOKENS if "<|return|>" in tokens else _END_TOKENS
    pairs = enumerate(zip(tokens, types, strict=False))
    usual = [index for index, (token, kind) in pairs if token in ends and kind == CONTROL_TOKEN]
    return list(dict.fromkeys([*(index for index in named if index is not None), *usual]))


def _config(file: GGUFFile, family: Family) -> dict[str, Any]:
    """What a config.json of the same model would say, so that one reader serves both."""
    prefix = f"{family.gguf_architecture}."
    _refuse_unsupported_features(file, prefix)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError("tensor 'token_embd.weight' is missing")
    heads = file.require(prefix + "attention.head_count", int)
    hidden = file.require(prefix + "embedding_length", int)
    head_dim = file.get(prefix + "attention.key_length", int) or hidden // max(heads, 1)
    turning = file.get(prefix + "rope.dimension_count", int)
    config = {
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.require(prefix + "feed_forward_length", int),
        "num_hidden_layers": file.require(prefix + "block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(prefix + "attention.head_count_kv", int) or heads,
        "head_dim": head_dim,
        "partial_rotary_factor": 1.0 if turning is None else turning / max(head_dim, 1),
        "rope_theta": file.get(prefix + "rope.freq_base", float),
        "rope_local_base_freq": file.get(prefix + "rope.freq_base_swa", float),
        "rope_scaling": _rope_scaling(file, prefix),
        "original_max_position_embeddings": file.get(prefix + "rope.scaling.original_context_length", int),
        "sliding_window": file.get(prefix + "attention.sliding_window", int) or None,
        **_sliding_layers(file, prefix),
        "num_experts": file.get(prefix + "expert_count", int),
        "num_experts_per_tok": file.get(prefix + "expert_used_count", int),
        "moe_intermediate_size": file.get(prefix + "expert_feed_forward_length", int),
        "rms_norm_eps": file.require(prefix + "attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": file.require(prefix + "context_length", int),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": _end_of_generation_ids(file),
    }
    config = {key: value for key, value in config.items() if value is not None or key in _NONE_SAYS_NONE}
    return {**config, **family.gguf_defaults(ConfigKeys(config))}


def _sliding_layers(file: GGUFFile, prefix: str) -> dict[str, Any]:
    """Which layers have a window, where the file says it: every one but each n-th, or layer by layer."""
    pattern = file.metadata.get(prefix + "attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return {"layer_types": [SLIDING if slides else FULL for slides in pattern]}
    return {"sliding_window_pattern": pattern}


def _refuse_unsupported_features(file: GGUFFile, prefix: str) -> None:
    if file.get("split.count", int) not in (None, 0, 1):
        raise ModelError("split GGUF files are not supported; merge them with llama-gguf-split --merge")
    key_length, value_length = (file.get(f"{prefix}attention.{kind}_length", int) for kind in ("key", "value"))
    if value_length not in (None, key_length):
        raise ModelError("heads of keys and of values of different lengths are not supported")


def _rope_scaling(file: GGUFFile, prefix: str) -> dict[str, Any]:
    """The section of a config.json. Llama 3's factors and those of LongRoPE are tensors."""
    scaling = prefix + "rope.scaling."
    factor = file.get(scaling + "factor", float) or file.get(prefix + "rope.scale_linear", float)
    kind = file.get(scaling + "type", str) or ("none" if factor in (None, 0.0, 1.0) else "linear")
    section: dict[str, Any] = {
        "factor": factor,
        "original_max_position_embeddings": file.get(scaling + "original_context_length", int),
        "beta_fast": file.get(scaling + "yarn_beta_fast", float),
        "beta_slow": file.get(scaling + "yarn_beta_slow", float),
        "llama_4_scaling_beta": file.get(prefix + "attention.temperature_scale", float),
    }
    attention_factor = file.get(scaling + "attn_factor", float)
    if attention_factor not in (None, 1.0) and _LONG_FACTORS not in file.tensors:
        raise ModelError(f"rope scaling {kind!r} with an attn_factor of {attention_factor} is not supported")
    multiplier = file.get(scaling + "yarn_log_multiplier", float)
    if multiplier:
        section |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    if _LONG_FACTORS in file.tensors:
        kind = "longrope"
        section["short_factor"], section["long_factor"] = _floats(file, _SHORT_FACTORS), _floats(file, _LONG_FACTORS)
        section["attention_factor"] = attention_factor
    elif _FACTORS in file.tensors:
        if kind != "none":
            raise ModelError(f"rope scaling {kind!r} together with tensor {_FACTORS!r} is not supported")
        kind, section["factors"] = "llama3", _floats(file, _FACTORS)
    section["rope_type"] = "default" if kind == "none" else kind
    return {key: value for key, value in section.items() if value is not None}


def _floats(file: GGUFFile, name: str) -> list[float]:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise ModelError(f"tensor {name!r} is missing")
    if tensor.type != GGMLQuantizationType.F32:
        raise ModelError(f"tensor {name!r} has the type {tensor.type.name}, must be F32")
    values: list[float] = file.data(name).view(np.float32).ravel().tolist()
    return values


def _check_tensors(file: GGUFFile, spec: ModelSpec) -> None:
    names = gguf_tensor_names(spec)
    expected = {names[name]: shape for name, shape in stored_shapes(spec, stacks_experts=True).items()}
    for name, shape in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise ModelError(f"tensor {name!r} is missing")
        if tensor.shape != shape:
            raise ModelError(f"tensor {name!r} has the shape {tensor.shape}, must be {shape}")
        if tensor.type.name not in _TYPES:
            raise ModelError(f"tensor {name!r} has the unsupported type {tensor.type.name}")
    known = expected.keys() | {_FACTORS, _SHORT_FACTORS, _LONG_FACTORS}
    unknown = [name for name in file.tensors if name not in known]
    if unknown:
        raise ModelError(f"tensor {unknown[0]!r} belongs to a feature that is not supported")
