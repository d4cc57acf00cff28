"""``kernels.between_products`` as Triton kernels. A row's result does not depend on how many rows there are."""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from evospec.kernels.heads import HeadNorms, Heads, Rotation

_COLUMNS = 1024
"""Of gates, a program's"""


@triton.jit
def _factor(x, size, eps):
    """What makes the root mean square of ``x``, whose other numbers are 0, one."""
    return tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)


@triton.jit
def _norm_kernel(
    x,
    added,
    added_weight,
    weight,
    total,
    out,
    size,
    parts,
    eps,
    HAS_ADDED: tl.constexpr,
    NORMS_ADDED: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program: a row. What plain torch rounds in between is rounded here, too."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = column < size, row * size + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        more = tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        if NORMS_ADDED:
            more = more * _factor(more, size, eps) * tl.load(added_weight + column, mask=inside, other=0.0)
            more = more.to(added.dtype.element_ty).to(tl.float32)
        value = (value + more).to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
        value = value.to(tl.float32)
    if HAS_OUT:
        of_part = weight + (row % parts) * size
        normed = value * _factor(value, size, eps) * tl.load(of_part + column, mask=inside, other=0.0)
        tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _heads_kernel(
    product,
    stride,
    positions,
    cos_sin,
    q_weight,
    k_weight,
    q_out,
    k_out,
    num_queries,
    num_keys,
    dim,
    rotary,
    eps,
    HAS_NORMS: tl.constexpr,
    HAS_ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program: a head of a token. ``BLOCK``: ``dim``, rounded up to a power of two."""
    token, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside, turns, is_first = d < dim, d < rotary, d < rotary // 2
    out, weight = q_out + (token * num_queries + head) * dim, q_weight
    if head >= num_queries:
        out, weight = k_out + (token * num_keys + head - num_queries) * dim, k_weight
    other = tl.where(is_first, d + rotary // 2, d - rotary // 2)
    source = product + token * stride + head * dim
    x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + other, mask=turns, other=0.0).to(tl.float32)
    if HAS_NORMS:
        factor = _factor(x, dim, eps)
        x = x * factor * tl.load(weight + d, mask=inside, other=0.0)
        y = y * factor * tl.load(weight + other, mask=turns, other=0.0)
        x, y = x.to(product.dtype.element_ty).to(tl.float32), y.to(product.dtype.element_ty).to(tl.float32)
    if HAS_ROTARY:
        angle = cos_sin + tl.load(positions + token).to(tl.int64) * rotary + tl.where(is_first, d, other)
        cos, sin = tl.load(angle, mask=turns, other=1.0), tl.load(angle + rotary // 2, mask=turns, other=0.0)
        x = x * cos + tl.where(is_first, -y, y) * sin
    tl.store(out + d, x.to(q_out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(product, out, size, slope, limit, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Each program: ``BLOCK`` columns of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, source = column < size, product + row * 2 * size + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u, with u = sqrt(2 / pi) (x + 0.044715 x^3).
        gate = gate * tl.sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        gate = gate * tl.sigmoid(slope * gate)
    tl.store(out + row * size + column, (gate * up).to(out.dtype.element_ty), mask=inside)


def norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As ``rms_norm``."""
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    _launch_norm(x, None, None, weight, None, out, eps, weight.numel() // size)
    return out


def add_triton(
    residual: torch.Tensor, added: torch.Tensor, norm: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``add_and_norm``; without ``weight`` the second result means nothing."""
    residual, added = residual.contiguous(), added.contiguous()
    total = torch.empty_like(residual)
    out = total if weight is None else torch.empty_like(residual)
    _launch_norm(residual, added, norm, weight, total, out, eps, 1)
    return total, out


def _launch_norm(
    x: torch.Tensor,
    added: torch.Tensor | None,
    added_weight: torch.Tensor | None,
    weight: torch.Tensor | None,
    total: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    parts: int,
) -> None:
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    others = [x if tensor is None else tensor for tensor in (added, added_weight, weight, total)]
    _norm_kernel[(x.numel() // size,)](
        *(x, *others, out, size, parts, eps),
        HAS_ADDED=added is not None,
        NORMS_ADDED=added_weight is not None,
        HAS_OUT=weight is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )


def prepare_heads_triton(
    product: torch.Tensor, shape: Heads, norms: HeadNorms | None, rotation: Rotation | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``prepare_heads``, without the values."""
    product, (num_queries, num_keys, dim) = product.contiguous(), shape
    q, k = (
        torch.empty(*product.shape[:-1], heads, dim, dtype=product.dtype, device=product.device)
        for heads in (num_queries, num_keys)
    )
    q_weight, k_weight, eps = (product, product, 0.0) if norms is None else norms
    cos_sin, positions = (product, product) if rotation is None else rotation
    rotary = 0 if rotation is None else cos_sin.shape[1]
    _heads_kernel[(product.numel() // product.shape[-1], num_queries + num_keys)](
        *(product, product.shape[-1], positions, cos_sin, q_weight, k_weight, q, k),
        *(num_queries, num_keys, dim, rotary, eps),
        HAS_NORMS=norms is not None,
        HAS_ROTARY=rotation is not None,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return q, k


def gated_triton(product: torch.Tensor, activation: str, slope: float, limit: float) -> torch.Tensor:
    """As ``gated``; the numbers are gpt-oss's."""
    product, size = product.contiguous(), product.shape[-1] // 2
    out = torch.empty(*product.shape[:-1], size, dtype=product.dtype, device=product.device)
    grid = product.numel() // (2 * size), triton.cdiv(size, _COLUMNS)
    _gate_kernel[grid](product, out, size, slope, limit, ACTIVATION=activation, BLOCK=_COLUMNS)
    return out
