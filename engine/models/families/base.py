"""What a family of decoders is, and what all of them read from a configuration. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evospec.engine.models.config import MAX_LAYERS, Activation, LayerSpec, ModelError, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.rope_scaling import read_rope

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"
"""Values of ``layer_types``."""


@dataclass(frozen=True)
class Family:
    """How the models of a family are stored and read."""

    model_type: str
    """In a config.json"""
    read: Callable[[ConfigKeys], ModelSpec]
    """From the keys of a config.json, or from those of a GGUF file under the same names; raises ``ModelError``"""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json may leave out, as transformers has it"""
    gguf_architecture: str | None = None
    """``general.architecture`` in GGUF files; None: they call it by another family's name, or there are none"""
    gguf_defaults: Callable[[ConfigKeys], Mapping[str, Any]] = lambda config: {}
    """What GGUF files leave out, from what they say"""
    gguf_interleaves_rotary: bool = False
    """Whether rows of q and k are stored in llama.cpp's own order there"""
    norm_offset: float = 0.0
    """What is added to the weights of norms. GGUF files have it added already"""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Matrices of a layer that are stored one below the other, by the name of what they are stored as"""
    alternates_experts: bool = False
    """Whether the matrices of a layer's experts are one tensor in safetensors, in which rows of gate and up alternate;
    those of floating-point numbers lie there as [experts, columns, rows]"""
    names: Mapping[str, str] = field(default_factory=dict)
    """Ends of names in safetensors that others call otherwise, and what they call them"""


def read_decoder(config: ConfigKeys, activation_key: str = "hidden_act") -> ModelSpec:
    """A decoder as Llama's: what it reads is the same in all families, which replace what is theirs.

    Raises:
        ModelError: a feature that is not supported, or a missing or ill-typed entry.
    """
    config.refuse("mlp_bias")
    if (activation := config.text(activation_key, "silu")) not in _ACTIVATIONS:
        raise ModelError(f"not supported: {activation_key} = {activation!r}")
    num_heads, hidden_size = config.size("num_attention_heads"), config.size("hidden_size")
    head_dim = config.size("head_dim", hidden_size // num_heads)
    rope = read_rope(config, config.section("rope_parameters", "rope_scaling"), head_dim)
    return ModelSpec(
        architecture=config.text("model_type", ""),
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.size("num_key_value_heads", num_heads),
        head_dim=head_dim,
        layers=(LayerSpec(rope),) * config.size("num_hidden_layers", most=MAX_LAYERS),
        rms_norm_eps=config.number("rms_norm_eps", float, 1e-6),
        max_position_embeddings=config.number("max_position_embeddings", int),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        bos_token_id=next(iter(config.ids("bos_token_id")), None),
        eos_token_ids=config.ids("eos_token_id"),
        attention_scale=head_dim**-0.5,
        activation=_ACTIVATIONS[activation],
    )


def layers_of_types(
    config: ConfigKeys, spec: ModelSpec, sliding: LayerSpec, slides: Callable[[int], bool]
) -> tuple[LayerSpec, ...]:
    """The layers of ``spec``, which are all alike, some of them replaced by ``sliding``.

    Which, ``layer_types`` says; where there are none, ``slides``.
    """
    kinds, count = {FULL: spec.layers[0], SLIDING: sliding}, spec.num_layers
    types = config.items("layer_types", count) or [SLIDING if slides(index) else FULL for index in range(count)]
    for name in types:
        if not isinstance(name, str) or name not in kinds:
            raise ModelError(f"not supported: {name!r} among layer_types")
    return tuple(kinds[name] for name in types)
