"""A tiny model of every family, with the features that its configurations can have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evospec.engine.models.config import ModelFiles
from tests.tiny_models import make_directory

WINDOW = 24
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0]}


@dataclass(frozen=True)
class TinyFamily:
    """``model_type``, and entries of its config.json."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    has_gguf: bool = True
    """Whether GGUF files can say all of it"""
    seed: int = 0
    """Of the weights. Where two experts are nearly as good, bfloat16 may take the other, and then nothing can be said
    about how near to float32 it is; with these seeds that is rare."""

    def make(self, directory: Path, **overrides: Any) -> ModelFiles:
        return make_directory(directory, self.model_type, seed=self.seed, **(self.config | overrides))


FAMILIES = {
    "llama, linear rope": TinyFamily("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama, yarn": TinyFamily("llama", {"rope_scaling": YARN}),
    "qwen2, sliding": TinyFamily(
        "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, has_gguf=False
    ),
    "qwen3": TinyFamily("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3, tied, yarn": TinyFamily("qwen3", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    "qwen3_moe": TinyFamily(
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True},
        seed=2,
    ),
    "qwen3_moe, weights as they are": TinyFamily(
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        has_gguf=False,
        seed=2,
    ),
    "mistral": TinyFamily("mistral", {"sliding_window": None}, has_gguf=False),
    "mistral, sliding": TinyFamily("mistral", {"sliding_window": WINDOW}, has_gguf=False),
    "ministral": TinyFamily(
        "ministral",
        {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        has_gguf=False,
    ),
    "ministral3": TinyFamily(
        "ministral3",
        {
            "max_position_embeddings": 1024,
            "rope_parameters": YARN
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "rope_theta": 1e6}
            | {"original_max_position_embeddings": 256},
        },
    ),
    "smollm3": TinyFamily("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "phi3": TinyFamily("phi3", {"sliding_window": WINDOW, "num_key_value_heads": 4}),
    "phi3, longrope": TinyFamily(
        "phi3", {"partial_rotary_factor": 0.5, "rope_scaling": LONGROPE, "original_max_position_embeddings": 8}
    ),
    "phi3, short factors of longrope": TinyFamily(
        "phi3", {"partial_rotary_factor": 0.5, "rope_scaling": LONGROPE, "original_max_position_embeddings": 256}
    ),
    "gpt_oss": TinyFamily(
        "gpt_oss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_scaling": YARN | {"truncate": False},
            "attention_bias": True,
        },
    ),
    "gemma3": TinyFamily(
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
    "gemma3, as saved by transformers 5": TinyFamily(
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        has_gguf=False,
    ),
}
