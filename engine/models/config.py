"""What a model is, as far as the engine must know: read from GGUF metadata or a ``config.json``. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Architecture = Literal["llama", "qwen2"]
SUPPORTED_ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2")
_Number = TypeVar("_Number", int, float)


class ModelError(Exception):
    """A model cannot be found, fetched, read or served; the message names the file and the reason."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: a ``.gguf`` file, or a directory with ``config.json`` and ``*.safetensors``."""

    name: str
    path: Path
    format: Literal["gguf", "safetensors"]


@dataclass(frozen=True)
class ModelSpec:
    """Shape and constants of a llama-family decoder.

    ``rope_freq_factors`` ([head_dim / 2], or None) divide the rotary inverse frequencies (Llama 3 scaling).
    ``attention_bias`` says whether the q, k and v projections have a bias.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_freq_factors: tuple[float, ...] | None
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim "
            "rope_theta rms_norm_eps max_position_embeddings"
        )
        for name in sizes.split():
            if getattr(self, name) <= 0:
                raise ModelError(f"{name} is {getattr(self, name)}, must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ModelError(f"head_dim is {self.head_dim}, must be even for rotary embedding")
        for token_id in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            if not 0 <= token_id < self.vocab_size:
                raise ModelError(f"token id {token_id} is outside of the vocabulary of {self.vocab_size}")
        if self.rope_freq_factors is not None and len(self.rope_freq_factors) != self.head_dim // 2:
            raise ModelError(f"{len(self.rope_freq_factors)} rope frequency factors, need {self.head_dim // 2}")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight the model needs, by its Hugging Face name."""
        hidden, q_size, kv_size = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (size, hidden)
                if self.attention_bias:
                    shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
            shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q_size)
            shapes[prefix + "mlp.gate_proj.weight"] = (self.intermediate_size, hidden)
            shapes[prefix + "mlp.up_proj.weight"] = (self.intermediate_size, hidden)
            shapes[prefix + "mlp.down_proj.weight"] = (hidden, self.intermediate_size)
        return shapes


def check_architecture(name: object) -> Architecture:
    """Raises ``ModelError`` unless ``name`` is a supported architecture."""
    for architecture in SUPPORTED_ARCHITECTURES:
        if name == architecture:
            return architecture
    raise ModelError(f"architecture {name!r} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)})")


def spec_from_config(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> ModelSpec:
    """From a Hugging Face ``config.json`` and ``generation_config.json`` (may be empty).

    Raises:
        ModelError: unsupported architecture or feature, or a missing or ill-typed entry.
    """
    architecture = check_architecture(config.get("model_type"))
    _refuse_unsupported_features(config)
    num_heads = _number(config, "num_attention_heads", int)
    hidden_size = _number(config, "hidden_size", int)
    head_dim = _number(config, "head_dim", int, hidden_size // max(num_heads, 1))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = _number(rope if "rope_theta" in rope else config, "rope_theta", float, 10000.0)
    return ModelSpec(
        architecture=architecture,
        vocab_size=_number(config, "vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=_number(config, "intermediate_size", int),
        num_layers=_number(config, "num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=_number(config, "num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_freq_factors=_rope_freq_factors(rope, theta, head_dim),
        rms_norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
        max_position_embeddings=_number(config, "max_position_embeddings", int),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=architecture == "qwen2",
        bos_token_id=next(iter(_as_ids(config.get("bos_token_id"), "bos_token_id")), None),
        eos_token_ids=_as_ids(generation_config.get("eos_token_id", config.get("eos_token_id")), "eos_token_id"),
    )


def _refuse_unsupported_features(config: Mapping[str, Any]) -> None:
    refused = [key for key in ("quantization_config", "mlp_bias", "use_sliding_window") if config.get(key)]
    if config.get("model_type") == "llama" and config.get("attention_bias"):
        refused.append("attention_bias")
    if config.get("hidden_act", "silu") != "silu":
        refused.append("hidden_act")
    if refused:
        raise ModelError("not supported: " + ", ".join(f"{key} = {config[key]!r}" for key in refused))


def _number(config: Mapping[str, Any], key: str, kind: type[_Number], default: _Number | None = None) -> _Number:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not isinstance(value, int)):
        raise ModelError(f"{key} is {value!r}, must be of type {kind.__name__}")
    return kind(value)


def _as_ids(value: Any, key: str) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in ids):
        raise ModelError(f"{key} is {value!r}, must be an integer or a list of integers")
    return tuple(ids)


def _rope_freq_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...] | None:
    """Divisors of the inverse frequencies: Llama 3.1's scaling, none for plain rotary embedding."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"rope scaling {kind!r} is not supported (supported: llama3)")
    factor = _number(rope, "factor", float)
    low = _number(rope, "low_freq_factor", float)
    high = _number(rope, "high_freq_factor", float)
    context = _number(rope, "original_max_position_embeddings", int)
    if high <= low or factor <= 0:
        raise ModelError(f"rope scaling: factor {factor}, low_freq_factor {low}, high_freq_factor {high}")
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        smooth = min(max((context / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
