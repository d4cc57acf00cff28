"""Sampling as argmax(logits + Gumbel noise), with noise that is a hash of (seed, position, token).

The noise has no state: the same seed, position and token id give the same noise on every device, in
every batch and whatever was drafted. That makes a sampled choice as reproducible as a greedy one
(Gumbel-max trick; the coupling of draft and target is Daliri, Musco, Suresh, arXiv 2408.07978).

The hash, in unsigned arithmetic, for C++ and Triton to repeat:

    key = mix64(mix64(seed) + position * 0x9E3779B97F4A7C15)      64 bits, once a row (splitmix64)
    x   = token * 0x9E3779B1 + low32(key)                         32 bits from here on
    x   = mix32(mix32(x) ^ high32(key))
    u   = (x + 0.5) / 2**32                                       in (0, 1), exact in float64
    g   = float32(-log(-log(u)))                                  logarithms in float64

The logarithms are taken in float64 so that the last-bit differences between maths libraries vanish
in the rounding to float32.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_GOLDEN64 = 0x9E3779B97F4A7C15
_GOLDEN32 = 0x9E3779B1


def _signed(value: int, bits: int) -> int:
    """The two's-complement reading of an unsigned integer: the same modulo 2**bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def seeds_tensor(seeds: list[int], device: torch.device | None = None) -> torch.Tensor:
    """[N] int64 from seeds of any size; only their lowest 64 bits count."""
    return torch.tensor([_signed(seed, 64) for seed in seeds], dtype=torch.int64, device=device)


def _shift64(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014); int64 products wrap modulo 2**64."""
    x = (x ^ _shift64(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift64(x, 27)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift64(x, 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 (C. Wellons, hash-prospector) on values in [0, 2**32) held in int64.

    The multiplier is read as signed, so that products stay within 63 bits.
    """
    x = ((x ^ (x >> 16)) * _signed(0x7FEB352D, 32)) & _MASK32
    x = ((x ^ (x >> 15)) * _signed(0x846CA68B, 32)) & _MASK32
    return x ^ (x >> 16)


def hash_tokens(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The 32-bit hash of (seed, position, token id).

    Args:
        seeds: [N] int64.
        positions: [N] int64.
        token_ids: [N, K] or [1, K] int64, each below 2**32.

    Returns:
        [N, K] int64 in [0, 2**32).
    """
    key = _mix64(_mix64(seeds) + positions * _signed(_GOLDEN64, 64))
    low, high = (key & _MASK32).unsqueeze(1), _shift64(key, 32).unsqueeze(1)
    x = (token_ids * _signed(_GOLDEN32, 32) + low) & _MASK32
    return _mix32(_mix32(x) ^ high)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, [N, K] float32 between -3.2 and 22.9; arguments as ``hash_tokens``."""
    uniform = (hash_tokens(seeds, positions, token_ids).double() + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()


def gumbel_argmax(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sample per row from softmax(logits): argmax(logits + noise), ties to the lowest token id.

    Args:
        logits: [N, V] float32, or [N, K] for a subset of tokens; -inf excludes a token.
        seeds: [N] int64.
        positions: [N] int64, index of the chosen token in its sequence.
        token_ids: [N, K] int64, the tokens the columns of ``logits`` stand for (None: 0 .. V - 1).

    Returns:
        [N] int64 token ids.
    """
    if token_ids is None:
        columns = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0)
        return (logits + gumbel_noise(seeds, positions, columns)).argmax(dim=1)
    scores = logits + gumbel_noise(seeds, positions, token_ids)
    best = scores.amax(dim=1, keepdim=True)
    return torch.where(scores == best, token_ids, torch.iinfo(torch.int64).max).amin(dim=1)
