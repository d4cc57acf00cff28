"""The weights that a draft's training begins with: the target's last layer, on features of one size each.

The target's hidden states differ in size by orders of magnitude from one dimension to the next, and no learning rate
suits them all. So each captured layer has an RMS norm, whose weights make every feature about 1 large, and the draft's
own hidden states are as large. Then one rate suits the drafts of all models, and a draft in 4 bits loses little.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from evospec.engine.models.config import ModelSpec
from evospec.engine.models.eagle3 import Eagle3

_SMALLEST = 1e-3


def init_from_target(draft: Eagle3, load_weight: Callable[[str], torch.Tensor], spec: ModelSpec) -> None:
    """Copy the target's last layer. It sees g = the high feature, and next to nothing of the token's embedding.

    Args:
        draft: with an MLP at least as wide as the target's (more units start without effect), or narrower (the first).
        load_weight: the target's weight of a Hugging Face name, float32.
        spec: of the target. A mixture of experts gives the draft's MLP nothing to start from.
    """
    config = draft.config
    hidden = config.hidden_size
    prefix = f"model.layers.{config.num_target_layers - 1}."

    def added(name: str, norm: str) -> torch.Tensor:
        """A matrix whose product the layer adds, in a draft without the target's ``norm`` behind it."""
        weight = load_weight(f"{prefix}{name}.weight")
        if not spec.output_norms:
            return weight
        return weight * load_weight(f"{prefix}{norm}.weight")[:, None] / weight.square().sum(1).mean().sqrt()

    with torch.no_grad():
        draft.fc.weight.mul_(0.1)
        draft.fc.weight[:, -hidden:] = torch.eye(hidden)
        qkv = torch.cat([load_weight(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"])
        draft.qkv_proj.weight[:, :hidden].mul_(0.3)
        draft.qkv_proj.weight[:, hidden:] = qkv
        if config.attention_bias:
            biases = [load_weight(f"{prefix}self_attn.{name}_proj.bias") for name in "qkv"]
            draft.qkv_proj.bias.copy_(torch.cat(biases))
        if draft.q_norm is not None and draft.k_norm is not None:
            draft.q_norm.copy_(load_weight(f"{prefix}self_attn.q_norm.weight"))
            draft.q_norm.mul_(spec.attention_scale * spec.head_dim**0.5)  # a draft's own scale is 1 / sqrt(head_dim)
            draft.k_norm.copy_(load_weight(f"{prefix}self_attn.k_norm.weight"))
        draft.hidden_norm.copy_(load_weight(prefix + "input_layernorm.weight"))
        draft.o_proj.weight.copy_(added("self_attn.o_proj", "post_attention_layernorm"))
        draft.post_attention_norm.copy_(load_weight(f"{prefix}{spec.mlp_norm}.weight"))
        draft.output_norm.copy_(load_weight("model.norm.weight"))
        if spec.experts is not None:
            return
        gate, up = (load_weight(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up"))
        width, inner = min(config.intermediate_size, len(gate)), config.intermediate_size
        draft.gate_up_proj.weight[:width] = gate[:width]
        draft.gate_up_proj.weight[inner : inner + width] = up[:width]
        draft.down_proj.weight[:, width:] = 0
        draft.down_proj.weight[:, :width] = added("mlp.down_proj", "post_feedforward_layernorm")[:, :width]


def fit_to_features(draft: Eagle3, features: torch.Tensor) -> None:
    """Make a draft that has the target's last layer work with hidden states of which each is about 1 large.

    Args:
        draft: as ``init_from_target`` leaves it, with a norm of each layer's features.
        features: [T, fused_size] of some positions.
    """
    hidden = draft.config.hidden_size
    sizes = features.float().square().mean(0).sqrt().clamp(min=_SMALLEST).view(-1, hidden)
    means = sizes.square().mean(1, keepdim=True).sqrt()
    assert draft.feature_norm is not None
    with torch.no_grad():
        draft.feature_norm.copy_((means / sizes).flatten())
        for norm in (draft.hidden_norm, draft.post_attention_norm, draft.output_norm):
            norm.mul_(sizes[-1] / means[-1])
        for matrix in (draft.o_proj, draft.down_proj):
            matrix.weight.div_(sizes[-1, :, None])
