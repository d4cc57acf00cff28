"""Random EAGLE-3 drafts, written as each project writes its own, with what its definition makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.reference.eagle3 import Definition

NUM_LAYERS, HIDDEN, VOCAB = 8, 64, 512
"""Of the target."""
DEFAULT_BOUNDARIES = (2, 4, 5)
"""[2, n // 2, n - 3]"""


@dataclass(frozen=True)
class Checkpoint:
    """A draft's ``config.json`` and tensors, and what they mean."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    definition: Definition
    file: str = "model.safetensors"

    def write(self, directory: Path, **changes: Any) -> Path:
        """``changes`` are of the configuration."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config | changes))
        path = directory / self.file
        torch.save(self.tensors, path) if path.suffix == ".bin" else save_file(self.tensors, path)
        return directory


@dataclass
class Shape:
    """Of a random draft, and what it has of what is optional."""

    layer: str = "layers.0."
    hidden: int = HIDDEN
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    eps: float = 1e-5
    theta: float = 10000.0
    num_features: int = 3
    head_size: int | None = 160
    has_t2d: bool = True
    has_embedding: bool = False
    bias: bool = False
    qk_norm: bool = False
    feature_norms: str = "none"
    dtype: torch.dtype = torch.bfloat16
    frequencies: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.frequencies = self.theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)

    def config(self, **more: Any) -> dict[str, Any]:
        """What the projects' configurations have in common."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "max_position_embeddings": 2048,
            "vocab_size": VOCAB,
            "draft_vocab_size": self.head_size or VOCAB,
            "tie_word_embeddings": False,
        } | more

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        generator, hidden = torch.Generator().manual_seed(seed), self.hidden
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        fused, attention, mlp = self.num_features * HIDDEN, self.layer + "self_attn.", self.layer + "mlp."
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, fused),
            attention + "q_proj.weight": (queries, 2 * hidden),
            attention + "k_proj.weight": (keys, 2 * hidden),
            attention + "v_proj.weight": (keys, 2 * hidden),
            attention + "o_proj.weight": (hidden, queries),
            mlp + "gate_proj.weight": (self.intermediate, hidden),
            mlp + "up_proj.weight": (self.intermediate, hidden),
            mlp + "down_proj.weight": (hidden, self.intermediate),
            "norm.weight": (hidden,),
        }
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            shapes[f"{self.layer}{name}.weight"] = (hidden,)
        if self.bias:
            shapes |= {
                f"{attention}{name}_proj.bias": (size,) for name, size in zip("qkv", (queries, keys, keys), strict=True)
            }
        if self.qk_norm:
            shapes |= {f"{attention}{name}_norm.weight": (self.head_dim,) for name in "qk"}
        if self.feature_norms == "each":
            shapes |= {f"fc_norm.{index}.weight": (HIDDEN,) for index in range(self.num_features)}
        if self.feature_norms == "all":
            shapes["input_norm.weight"] = (fused,)
        if self.head_size is not None:
            shapes["lm_head.weight"] = (self.head_size, hidden)
        if self.has_embedding:
            shapes["embed_tokens.weight"] = (VOCAB, hidden)
        made: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            made[name] = (1 + 0.3 * noise if "norm" in name else noise / math.sqrt(shape[-1])).to(self.dtype)
        return made | self._maps(generator)

    def _maps(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.head_size is None or self.head_size == VOCAB:
            return {}
        token_ids = torch.randperm(VOCAB, generator=generator)[: self.head_size].sort().values
        t2d = torch.zeros(VOCAB, dtype=torch.bool)
        t2d[token_ids] = True
        return {"d2t": token_ids - torch.arange(self.head_size)} | ({"t2d": t2d} if self.has_t2d else {})

    def definition(self, boundaries: tuple[int, ...] = DEFAULT_BOUNDARIES, **more: Any) -> Definition:
        heads = self.heads, self.kv_heads, self.head_dim
        return Definition(*heads, self.eps, self.frequencies, boundaries, self.layer, **more)


def safeailab(head_dim: int = 16) -> Checkpoint:
    """As yuhuili/EAGLE3-*: a pickle in float16, of a class that says nothing, without rope_theta and head_dim."""
    shape = Shape("midlayer.", heads=HIDDEN // head_dim, head_dim=head_dim, dtype=torch.float16)
    config = shape.config(architectures=["LlamaForCausalLM"])
    del config["rope_theta"], config["head_dim"]
    return Checkpoint(config, shape.tensors(1), shape.definition(), "pytorch_model.bin")


def specforge(head_dim: int = 32) -> Checkpoint:
    """As lmsys/*: layers by their outputs, heads unlike the target's, Llama 3's rope."""
    shape = Shape("midlayer.", heads=2, kv_heads=1, head_dim=head_dim, theta=500000.0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    wavelength = 2 * math.pi / shape.frequencies
    smooth = ((64 / wavelength - 1.0) / 3.0).clamp(0, 1)
    shape.frequencies = shape.frequencies * ((1 - smooth) / 8.0 + smooth)
    layers = {"eagle_aux_hidden_state_layer_ids": [1, 2, 6]}
    config = shape.config(architectures=["LlamaForCausalLMEagle3"], rope_scaling=scaling, eagle_config=layers)
    return Checkpoint(config, shape.tensors(2), shape.definition((2, 3, 7)))


def specforge_3_1(head_dim: int = 16) -> Checkpoint:
    """EAGLE-3.1: a norm for each feature, and the normalised state goes on."""
    shape = Shape("midlayer.", head_dim=head_dim, feature_norms="each")
    config = shape.config(architectures=["LlamaForCausalLMEagle3"], fc_norm=True, norm_output=True)
    return Checkpoint(config, shape.tensors(3), shape.definition(norm_output=True))


def angelslim(head_dim: int = 16) -> Checkpoint:
    """As AngelSlim/*_eagle3, here wider than its target, with an embedding of its own."""
    shape = Shape("midlayer.", hidden=96, head_dim=head_dim, has_embedding=True, intermediate=128, dtype=torch.float32)
    config = shape.config(
        architectures=["Eagle3LlamaForCausalLM"], target_model_type="llama", target_hidden_size=HIDDEN
    )
    return Checkpoint(config, shape.tensors(4), shape.definition(), "pytorch_model.bin")


def speculators(head_dim: int = 16) -> Checkpoint:
    """As RedHatAI/*-speculator.eagle3 for Llama: layers by their inputs, the norm before the residual."""
    shape = Shape(head_dim=head_dim, has_embedding=True, theta=500000.0)
    return Checkpoint(
        _speculators(shape, norm_before_residual=True, eagle_aux_hidden_state_layer_ids=[1, 4, 7]),
        shape.tensors(5),
        shape.definition((1, 4, 7), norm_before_residual=True),
    )


def speculators_qwen3(head_dim: int = 16) -> Checkpoint:
    """For Qwen3: norms of queries and keys, a norm before the fusion, four features, a sliding window, biases."""
    shape = Shape(
        head_dim=head_dim, has_embedding=True, qk_norm=True, feature_norms="all", num_features=4, bias=True, eps=1e-6
    )
    layer = {"model_type": "qwen3", "layer_types": ["sliding_attention"], "sliding_window": 9}
    config = _speculators(
        shape, layer, norm_before_fc=True, norm_output=True, eagle_aux_hidden_state_layer_ids=[1, 3, 5, 6]
    )
    return Checkpoint(config, shape.tensors(6), shape.definition((1, 3, 5, 6), norm_output=True, window=9))


def _speculators(shape: Shape, layer: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    nested = shape.config(**(layer or {}))
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": nested.pop("rope_theta")}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": nested,
        "draft_vocab_size": nested.pop("draft_vocab_size"),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "tiny/target", "architectures": ["LlamaForCausalLM"]},
        },
    } | more


def nvidia(head_dim: int = 16) -> Checkpoint:
    """As nvidia/*-Eagle3: d2t without t2d, layers by their inputs, a norm before the fusion, YaRN."""
    shape = Shape(head_dim=head_dim, has_t2d=False, feature_norms="all")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.0}
    shape.frequencies = _yarn(shape, 4.0, 64)
    eagle = {"use_aux_hidden_state": True, "norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [3, 5, 7]}
    config = shape.config(architectures=["LlamaForCausalLMEagle3"], rope_scaling=scaling, eagle_config=eagle)
    return Checkpoint(config, shape.tensors(7), shape.definition((3, 5, 7)))


def nvidia_copied_head(head_dim: int = 16) -> Checkpoint:
    """Without a vocabulary of its own, a draft is exported with the target's head."""
    shape = Shape(head_dim=head_dim, head_size=VOCAB)
    config = shape.config(architectures=["LlamaForCausalLMEagle3"], eagle_config={"use_aux_hidden_state": True})
    return Checkpoint(config, shape.tensors(8), shape.definition())


def headless(head_dim: int = 16) -> Checkpoint:
    """With the target's own head."""
    shape = Shape("model.midlayer.", head_dim=head_dim, head_size=None)
    config = shape.config(architectures=["LlamaForCausalLMEagle3"])
    return Checkpoint(config, shape.tensors(9), shape.definition())


def _yarn(shape: Shape, factor: float, original: int) -> torch.Tensor:
    """Frequencies that turn often are kept, those that turn less than once are divided."""

    def dimension(rotations: float) -> float:
        return shape.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(shape.theta))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), shape.head_dim - 1)
    ramp = ((torch.arange(shape.head_dim // 2) - low) / (high - low)).clamp(0, 1)
    return shape.frequencies * (1 - ramp) + shape.frequencies / factor * ramp


CHECKPOINTS = {
    one.__name__: one
    for one in (
        safeailab, specforge, specforge_3_1, angelslim, speculators, speculators_qwen3, nvidia, nvidia_copied_head,
        headless,
    )
}  # fmt: skip
