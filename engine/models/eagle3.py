"""The EAGLE-3 draft: one decoder layer over fused features of the target (arXiv 2503.01840).

The entry of token t is computed from token t and the target's features of position t - 1:

    g = fc(concat(low, mid, high features of position t - 1))
    x = concat(RMSNorm(embedding of token t), RMSNorm(g))               [2 * hidden]
    y = g + o_proj(attention(q, k, v of x, rotary at position t))
    a = y + mlp(RMSNorm(y))
    logits of token t + 1 = target's head(RMSNorm(a))

The next unrolled step takes a where the first took g. The target's embedding and head are its own, shared and frozen.
What a draft does in another way is its ``Variant``: those trained here norm each feature before ``fc``, those of other
projects have more of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from evospec.engine.models.config import ModelError
from evospec.engine.models.eagle3_config import CONFIG_FILE, WEIGHTS_FILE, Eagle3Config, Variant, read_draft
from evospec.kernels.batched_lora import LoraMatrix
from evospec.kernels.between_products import add_and_norm, gated, prepare_heads, rms_norm
from evospec.kernels.heads import HeadNorms, Heads, Rotation


class Additions(Protocol):
    """What an adapter adds to the draft's products."""

    def add_to(self, out: torch.Tensor, x: torch.Tensor, matrix: LoraMatrix) -> None:
        """Add to the product ``out`` of a matrix and ``x``, in place."""


class Eagle3(nn.Module):
    """The draft's weights and the parts of its forward pass; attention is the caller's."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        hidden, intermediate = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.fc = nn.Linear(config.fused_size, hidden, bias=False)
        self.embedding_norm = nn.Parameter(torch.ones(hidden))
        self.hidden_norm = nn.Parameter(torch.ones(hidden))
        self.qkv_proj = nn.Linear(2 * hidden, (heads + 2 * kv_heads) * config.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=False)
        self.post_attention_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.output_norm = nn.Parameter(torch.ones(hidden))
        variant, head_dim = config.variant, config.head_dim
        self.q_norm = nn.Parameter(torch.ones(head_dim)) if variant.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(head_dim)) if variant.qk_norm else None
        has_norm = variant.feature_norms != "none"
        self.feature_norm = nn.Parameter(torch.ones(config.fused_size)) if has_norm else None

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """[..., 3 * hidden] → g [..., hidden]"""
        if self.feature_norm is not None:
            parts = (self.config.num_feature_norms, -1)
            each = features.view(*features.shape[:-1], *parts)
            features = rms_norm(each, self.feature_norm.view(parts), self.config.rms_norm_eps).flatten(-2)
        fused: torch.Tensor = self.fc(features)
        return fused

    def qkv(
        self,
        embedding: torch.Tensor,
        g: torch.Tensor,
        lora: Additions | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [..., heads, head_dim], key and value [..., kv_heads, head_dim], rotated if there is a ``rotation``.

        ``lora``, here and below, is what the products gain.
        """
        config, eps = self.config, self.config.rms_norm_eps
        x = torch.cat((rms_norm(embedding, self.embedding_norm, eps), rms_norm(g, self.hidden_norm, eps)), dim=-1)
        product = self.qkv_proj(x)
        if lora is not None:
            lora.add_to(product, x, "qkv")
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = HeadNorms(self.q_norm, self.k_norm, eps)
        return prepare_heads(product, Heads(config.num_heads, config.num_kv_heads, config.head_dim), norms, rotation)

    def output(self, g: torch.Tensor, attended: torch.Tensor, lora: Additions | None = None) -> torch.Tensor:
        """g [..., hidden] and attention's output [..., heads, head_dim] → a [..., hidden]."""
        config, eps, heads = self.config, self.config.rms_norm_eps, attended.flatten(-2)
        residual = rms_norm(g, self.hidden_norm, eps) if config.variant.norm_before_residual else g
        added = self.o_proj(heads)
        if lora is not None:
            lora.add_to(added, heads, "output")
        y, normed = add_and_norm(residual, added, None, self.post_attention_norm, eps)
        product = gated(self.gate_up_proj(normed), "silu")
        added = self.down_proj(product)
        if lora is not None:
            lora.add_to(added, product, "down")
        a: torch.Tensor = y + added
        return rms_norm(a, self.output_norm, eps) if config.variant.norm_output else a

    def head_input(self, a: torch.Tensor) -> torch.Tensor:
        """What the head projects: RMSNorm(a)."""
        return a if self.config.variant.norm_output else rms_norm(a, self.output_norm, self.config.rms_norm_eps)


def save_draft(draft: Eagle3, directory: Path) -> None:
    """Write weights (bf16) and config."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().bfloat16().contiguous() for name, tensor in draft.state_dict().items()}
    save_file(weights, directory / WEIGHTS_FILE)
    config, standard = asdict(draft.config), asdict(Variant())
    config["variant"] = {name: value for name, value in config["variant"].items() if value != standard[name]}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_draft(directory: Path, dtype: torch.dtype, device: torch.device) -> Eagle3:
    """The draft of a directory, ready to serve; raises ``ModelError`` as ``read_draft`` does."""
    config = read_draft(directory)
    try:
        weights = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: {error}") from error
    return frozen_draft(config, weights, dtype, device)


def frozen_draft(
    config: Eagle3Config, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> Eagle3:
    """A draft of these weights, ready to serve."""
    with torch.device("meta"):
        draft = Eagle3(config)
    draft.load_state_dict(weights, assign=True)
    return draft.to(device=device, dtype=dtype).requires_grad_(False)
