"""``ModelSpec`` and tensor names of a GGUF file. Torch-free."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType

from engine.models.config import Architecture, ModelError, ModelSpec, check_architecture
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
CONTROL_TOKEN = 3
_END_TOKENS = frozenset({"<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"})
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


def _end_of_generation_ids(file: GGUFFile) -> tuple[int, ...]:
    """Ids that end a generation: the file's EOS and EOT, and the usual end-of-turn control tokens it contains."""
    named = [file.get(f"tokenizer.ggml.{kind}_token_id", int) for kind in ("eos", "eot")]
    types = file.get_list("tokenizer.ggml.token_type", int)
    tokens = zip(file.get_list("tokenizer.ggml.tokens", str), types, strict=False)
    usual = [index for index, (token, kind) in enumerate(tokens) if token in _END_TOKENS and kind == CONTROL_TOKEN]
    return tuple(dict.fromkeys([*(index for index in named if index is not None), *usual]))


def _read_spec(file: GGUFFile) -> ModelSpec:
    architecture = check_architecture(file.get("general.architecture", str))
    _refuse_unsupported_features(file, architecture)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError("tensor 'token_embd.weight' is missing")
    num_heads = file.require(f"{architecture}.attention.head_count", int)
    hidden_size = file.require(f"{architecture}.embedding_length", int)
    head_dim = file.get(f"{architecture}.attention.key_length", int) or hidden_size // max(num_heads, 1)
    if file.get(f"{architecture}.rope.dimension_count", int) not in (None, head_dim):
        raise ModelError("partial rotary embedding is not supported")
    return ModelSpec(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=file.require(f"{architecture}.feed_forward_length", int),
        num_layers=file.require(f"{architecture}.block_count", int),
        num_heads=num_heads,
        num_kv_heads=file.get(f"{architecture}.attention.head_count_kv", int) or num_heads,
        head_dim=head_dim,
        rope_theta=file.get(f"{architecture}.rope.freq_base", float) or 10000.0,
        rope_freq_factors=_rope_freq_factors(file),
        rms_norm_eps=file.require(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        max_position_embeddings=file.require(f"{architecture}.context_length", int),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias=architecture == "qwen2",
        bos_token_id=file.get("tokenizer.ggml.bos_token_id", int),
        eos_token_ids=_end_of_generation_ids(file),
    )


def _refuse_unsupported_features(file: GGUFFile, architecture: Architecture) -> None:
    if file.get("split.count", int) not in (None, 0, 1):
        raise ModelError("split GGUF files are not supported; merge them with llama-gguf-split --merge")
    if file.get(f"{architecture}.expert_count", int):
        raise ModelError("mixture-of-experts models are not supported")
    scaling = file.get(f"{architecture}.rope.scaling.type", str)
    if scaling not in (None, "none"):
        raise ModelError(f"rope scaling {scaling!r} is not supported")


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
