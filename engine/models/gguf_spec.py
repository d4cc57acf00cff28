"""``ModelSpec`` and tensor names of a GGUF file. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGMLQuantizationType

from engine.models.config import ModelError, ModelSpec, check_architecture
from engine.models.gguf_file import GGUFFile

SUPPORTED_TENSOR_TYPES = frozenset(
    {
        GGMLQuantizationType.F32,
        GGMLQuantizationType.F16,
        GGMLQuantizationType.BF16,
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q4_1,
        GGMLQuantizationType.Q5_0,
        GGMLQuantizationType.Q5_1,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q2_K,
        GGMLQuantizationType.Q3_K,
        GGMLQuantizationType.Q4_K,
        GGMLQuantizationType.Q5_K,
        GGMLQuantizationType.Q6_K,
    }
)
_CONTROL_TOKEN = 3
_END_OF_TURN_TOKENS = frozenset({"<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"})
_TOP_LEVEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_T = TypeVar("_T", int, float)


def gguf_tensor_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` → ``blk.3.attn_q.weight``."""
    if name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def spec_from_gguf(file: GGUFFile) -> ModelSpec:
    """Read the metadata and check that every tensor the model needs is there, in shape and in a known type.

    Raises:
        ModelError: unsupported architecture, feature or tensor type; missing or ill-shaped tensor.
    """
    try:
        spec = _read_spec(file)
        _check_tensors(file, spec)
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from None
    return spec


def end_of_generation_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: the file's EOS and EOT, and the usual end-of-turn control tokens it contains."""
    ids = [metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot") if _has_id(metadata, kind)]
    types = metadata.get("tokenizer.ggml.token_type", [])
    for index, token in enumerate(metadata.get("tokenizer.ggml.tokens", [])):
        if token in _END_OF_TURN_TOKENS and index < len(types) and types[index] == _CONTROL_TOKEN:
            ids.append(index)
    return tuple(dict.fromkeys(ids))


def _has_id(metadata: Mapping[str, Any], kind: str) -> bool:
    return isinstance(metadata.get(f"tokenizer.ggml.{kind}_token_id"), int)


def _read_spec(file: GGUFFile) -> ModelSpec:
    metadata = file.metadata
    architecture = check_architecture(metadata.get("general.architecture"))
    if metadata.get("split.count", 1) != 1:
        raise ModelError("split GGUF files are not supported; merge them with llama-gguf-split --merge")
    if metadata.get(f"{architecture}.expert_count", 0):
        raise ModelError("mixture-of-experts models are not supported")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(f"rope scaling {scaling!r} is not supported")

    def read(key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ModelError(f"{architecture}.{key} is {value!r}, must be of type {kind.__name__}")
        return value

    num_heads = read("attention.head_count", int)
    hidden_size = read("embedding_length", int)
    head_dim = read("attention.key_length", int, hidden_size // max(num_heads, 1))
    if read("rope.dimension_count", int, head_dim) != head_dim:
        raise ModelError("partial rotary embedding is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError("tensor 'token_embd.weight' is missing")
    return ModelSpec(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=read("feed_forward_length", int),
        num_layers=read("block_count", int),
        num_heads=num_heads,
        num_kv_heads=read("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        rope_theta=read("rope.freq_base", float, 10000.0),
        rope_freq_factors=_rope_freq_factors(file),
        rms_norm_eps=read("attention.layer_norm_rms_epsilon", float),
        max_position_embeddings=read("context_length", int),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias=architecture == "qwen2",
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"] if _has_id(metadata, "bos") else None,
        eos_token_ids=end_of_generation_ids(metadata),
    )


def _rope_freq_factors(file: GGUFFile) -> tuple[float, ...] | None:
    """Llama 3 scaling is stored as a tensor of divisors."""
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.type != GGMLQuantizationType.F32:
        raise ModelError(f"tensor 'rope_freqs.weight' has the type {tensor.type.name}, must be F32")
    return tuple(file.data("rope_freqs.weight").view(np.float32).ravel().tolist())


def _check_tensors(file: GGUFFile, spec: ModelSpec) -> None:
    if spec.num_layers > len(file.tensors):
        raise ModelError(f"{spec.num_layers} layers, but only {len(file.tensors)} tensors")
    expected = {gguf_tensor_name(name): shape for name, shape in spec.tensor_shapes().items()}
    for name, shape in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise ModelError(f"tensor {name!r} is missing")
        if tensor.shape != shape:
            raise ModelError(f"tensor {name!r} has the shape {tensor.shape}, must be {shape}")
        if tensor.type not in SUPPORTED_TENSOR_TYPES:
            raise ModelError(f"tensor {name!r} has the unsupported type {tensor.type.name}")
    unknown = [name for name in file.tensors if name not in expected and name != "rope_freqs.weight"]
    if unknown:
        raise ModelError(f"tensor {unknown[0]!r} belongs to a feature that is not supported")
