"""What a decoder layer does between its matrix products: norms, rotary embeddings, gates.

In plain torch each is several operations. On a GPU each is one Triton kernel, as a launch there takes longer than
what it computes. Gradients go through plain torch only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from evospec.kernels.heads import HeadNorms, Heads, Rotation

SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0
"""Of gpt-oss."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32; ``x``'s dtype.

    ``weight`` is [size], or [parts, size] for an ``x`` of [..., parts, size].
    """
    if _is_one_kernel(x):
        from evospec.kernels.triton.between_products import norm_triton

        return norm_triton(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * wide).to(x.dtype)


def add_normed(residual: torch.Tensor, added: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``residual`` + ``added`` [T, size]; with a weight ``norm`` [size], + the norm of ``added``."""
    if norm is None:
        return residual + added
    if _is_one_kernel(residual):
        from evospec.kernels.triton.between_products import add_triton

        return add_triton(residual, added, norm, None, eps)[0]
    return residual + rms_norm(added, norm, eps)


def add_and_norm(
    residual: torch.Tensor, added: torch.Tensor, norm: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add_normed`` of the first three, and the norm of that by ``weight`` [size]."""
    if _is_one_kernel(residual):
        from evospec.kernels.triton.between_products import add_triton

        return add_triton(residual, added, norm, weight, eps)
    total = add_normed(residual, added, norm, eps)
    return total, rms_norm(total, weight, eps)


def rotate(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotary embedding of [T, heads, dim]; the same shape and dtype."""
    cos, sin = rotation.cos_sin[rotation.positions].unsqueeze(1).chunk(2, dim=-1)
    size = rotation.cos_sin.shape[1]
    first, second = heads[..., :size].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
    return rotated if size == heads.shape[-1] else torch.cat((rotated, heads[..., size:]), dim=-1)


def prepare_heads(
    product: torch.Tensor, shape: Heads, norms: HeadNorms | None, rotation: Rotation | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys, each head normed and rotated if it is to be, and values: of a ``product`` that holds them."""
    q, k, v = shape.split(product)
    if _is_one_kernel(product):
        from evospec.kernels.triton.between_products import prepare_heads_triton

        return *prepare_heads_triton(product, shape, norms, rotation), v
    if norms is not None:
        q, k = rms_norm(q, norms.query, norms.eps), rms_norm(k, norms.key, norms.eps)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return q, k, v


def gated(product: torch.Tensor, activation: str) -> torch.Tensor:
    """Gates [..., size] times what follows them, of a ``product`` [..., 2 * size].

    ``activation``, of the gates: silu, gelu_tanh, or gpt-oss's swiglu_oai.
    """
    if _is_one_kernel(product):
        from evospec.kernels.triton.between_products import gated_triton

        return gated_triton(product, activation, SWIGLU_SLOPE, SWIGLU_LIMIT)
    gate, up = product.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_SLOPE * gate) * (up + 1)


def _is_one_kernel(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and not torch.is_grad_enabled()
