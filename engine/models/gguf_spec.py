"""``ModelSpec`` and tensor names of a GGUF file. Torch-free."""

from __future__ import annotations

import numpy as np
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from gguf.tensor_mapping import get_tensor_name_map

from engine.models.config import Architecture, ModelError, ModelSpec, check_architecture
from engine.models.gguf_file import GGUFFile

_TYPES = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
"""Of tensors, those that are supported."""
CONTROL_TOKEN = 3
_END_TOKENS = frozenset({"<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"})


def gguf_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """How a GGUF file calls the weights of a model, by their Hugging Face names, which end in .weight or .bias."""
    names = get_tensor_name_map(MODEL_ARCH[spec.architecture.upper()], spec.num_layers)
    return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in spec.tensor_shapes()}


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
    names = gguf_tensor_names(spec)
    expected = {names[name]: shape for name, shape in spec.tensor_shapes().items()}
    for name, shape in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise ModelError(f"tensor {name!r} is missing")
        if tensor.shape != shape:
            raise ModelError(f"tensor {name!r} has the shape {tensor.shape}, must be {shape}")
        if tensor.type.name not in _TYPES:
            raise ModelError(f"tensor {name!r} has the unsupported type {tensor.type.name}")
    unknown = [name for name in file.tensors if name not in expected and name != "rope_freqs.weight"]
    if unknown:
        raise ModelError(f"tensor {unknown[0]!r} belongs to a feature that is not supported")
