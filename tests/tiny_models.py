"""Tiny random models for tests, made on the spot: a Hugging Face directory, and the same weights as GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from evospec.engine.models.config import ModelFiles, ModelSpec
from evospec.engine.models.families.base import Family
from evospec.engine.models.families.known import family_of, spec_from_config
from evospec.engine.models.gguf_spec import gguf_tensor_names
from evospec.engine.models.stored_tensors import stored_rows, stored_shapes
from evospec.engine.models.weights import open_weights
from evospec.engine.text.tokenizer import Tokenizer as EngineTokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs through the forest.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    "Größe, naïve café, 東京, Привет, 👩‍🚀 and 3.14159 are not all ASCII.",
]


def tiny_config(architecture: str, **overrides: Any) -> dict[str, Any]:
    """A ``config.json`` of the family whose ``model_type`` is ``architecture``.

    Sizes are multiples of 32, so that GGUF can quantise.
    """
    config = {
        "model_type": architecture,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": architecture == "qwen2",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return config | overrides


def make_directory(
    directory: Path, architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> ModelFiles:
    """Write config, random weights and tokenizer; larger than usual weights keep the logits apart."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(architecture, **overrides)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "bos_token_id": 0}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    generator = torch.Generator().manual_seed(seed)
    tensors, one = {}, 1 - family_of(architecture).norm_offset
    for name, shape in stored_shapes(spec_from_config(config, {}), stacks_experts=False).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (one + 0.1 * noise if "norm" in name else 0.15 * noise).to(dtype)
    write_weights(directory, family_of(architecture), tensors)
    return ModelFiles(directory.name, directory, "safetensors")


def write_weights(directory: Path, family: Family, tensors: dict[str, torch.Tensor]) -> None:
    """Weights of the shapes of ``stored_shapes``, under the family's own names; several matrices have columns first."""
    own_names, stored = {usual: own for own, usual in family.names.items()}, {}
    for name, tensor in tensors.items():
        is_stack = tensor.dim() == 3
        end = next((end for end in own_names if name.endswith(f".{end}")), "")
        stored[name.removesuffix(end) + own_names.get(end, "")] = tensor.mT.contiguous() if is_stack else tensor
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def soften_layers(directory: Path) -> None:
    """Let a token say most of what comes after it: there is something to be learned from few answers."""
    path, is_output = directory / "model.safetensors", ("o_proj.weight", "down_proj.weight")
    weights = {name: weight * (0.1 if name.endswith(is_output) else 1.0) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def add_shape(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """The numbers that GGUF files of all families have."""
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)


def make_gguf(
    path: Path,
    directory: Path,
    tensor_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra_tensor: str | None = None,
) -> ModelFiles:
    """Write the model of ``directory`` as GGUF, matrices in ``tensor_type``, the way llama.cpp's converter does.

    ``extra_tensor`` is the name of a tensor that does not belong to the model.
    """
    config = json.loads((directory / "config.json").read_text())
    spec, family = spec_from_config(config, {}), family_of(config["model_type"])
    assert family.gguf_architecture is not None
    writer = gguf.GGUFWriter(path, family.gguf_architecture)
    writer.add_name(f"tiny {family.gguf_architecture}")
    add_shape(writer, spec)
    writer.add_vocab_size(spec.vocab_size)
    if spec.experts is not None:
        writer.add_expert_count(spec.experts.count)
        writer.add_expert_used_count(spec.experts.per_token)
        writer.add_expert_feed_forward_length(spec.intermediate_size)
    if windows := [window for window in spec.windows if window is not None]:
        writer.add_sliding_window(windows[0])
        writer.add_sliding_window_pattern([layer.sliding_window is not None for layer in spec.layers])
    _add_rope(writer, spec, config.get("rope_scaling") or config.get("rope_parameters") or {})
    _add_tokenizer(writer, config["vocab_size"])
    stored_names = gguf_tensor_names(spec)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.zeros(spec.head_dim, np.float32))
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads}
    for name, values in _gguf_tensors(directory, spec).items():
        for kind, count in heads.items():
            if family.gguf_interleaves_rotary and f"{kind}_proj" in name:
                values = _interleave_rotary(values, count)
        is_exact = values.ndim == 1 or name.endswith((".bias", "mlp.gate.weight"))
        stored = GGMLQuantizationType.F32 if is_exact else tensor_type
        writer.add_tensor(stored_names[name], gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(path.stem, path, "gguf")


def _gguf_tensors(directory: Path, spec: ModelSpec) -> dict[str, np.ndarray[Any, Any]]:
    """A matrix of all experts is one tensor, and so are those that the family stores together."""
    source, parts = open_weights(ModelFiles("", directory, "safetensors")), dict[str, list[np.ndarray[Any, Any]]]()
    places = stored_rows(spec, stacks_experts=True)
    for name, place in places.items():
        parts.setdefault(place.tensor, []).append(source.dequantized(name).numpy())
    return {place.tensor: np.concatenate(parts[place.tensor]).reshape(place.shape) for place in places.values()}


def _add_rope(writer: gguf.GGUFWriter, spec: ModelSpec, scaling: dict[str, Any]) -> None:
    rope = spec.rope
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(rope.dim)
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope.original_context or scaling["original_max_position_embeddings"])
    if "mscale_all_dim" in scaling:
        writer.add_rope_scaling_yarn_log_mul(scaling["mscale_all_dim"])
    if "llama_4_scaling_beta" in scaling:
        writer.add_attn_temperature_scale(scaling["llama_4_scaling_beta"])
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(rope.scale)
        writer.add_tensor("rope_factors_short.weight", np.array(rope.factors, np.float32))
        writer.add_tensor("rope_factors_long.weight", np.array(rope.long_factors, np.float32))
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(rope.factors, np.float32))


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of fewer than ``VOCAB_SIZE`` tokens, three of them special."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - 100,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


VOCABULARY = EngineTokenizer(tiny_tokenizer(), VOCAB_SIZE, None, (), None).fingerprint()
"""Of all tiny models."""


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    model = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    padding = range(len(tokens), vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[PAD{index}]" for index in padding)])
    writer.add_token_types([*types, *(gguf.TokenType.UNUSED for _ in padding)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _interleave_rotary(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of q and k rows (``permute`` in its convert_hf_to_gguf.py)."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
