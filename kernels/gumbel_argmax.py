"""Sampling as argmax(logits + Gumbel noise), with noise that is a hash of (seed, position, token).

The noise has no state: the same seed, position and token id give the same noise on every device, in
every batch and whatever was drafted. That makes a sampled choice as reproducible as a greedy one
(Gumbel-max trick; the coupling of draft and target is Daliri, Musco, Suresh, arXiv 2408.07978).

The hash, for C++ and Triton to repeat; integers wrap, shifts are logical:

    key = mix64(mix64(seed) + position * 0x9E3779B97F4A7C15)      64 bits, once a row
    x   = token * 0x9E3779B1 + low32(key)                         32 bits from here on
    x   = mix32(mix32(x) ^ high32(key))
    u   = (int32(x) + 2**31 + 0.5) / 2**32                        in (0, 1), exact in float64
    g   = float32(-log(-log(u)))                                  logarithms in float64

The logarithms are taken in float64 so that the last-bit differences between maths libraries vanish
in the rounding to float32.
"""

from __future__ import annotations

import torch

from evospec.kernels.kept_thresholds import unpack_bits


def signed(value: int, bits: int) -> int:
    """The two's-complement reading of an integer: the same modulo 2**bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def seeds_tensor(seeds: list[int]) -> torch.Tensor:
    """[N] int64 from seeds of any size; their lowest 64 bits count."""
    return torch.tensor([signed(seed, 64) for seed in seeds], dtype=torch.int64)


def _shift64(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64."""
    x = (x ^ _shift64(x, 30)) * signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift64(x, 27)) * signed(0x94D049BB133111EB, 64)
    return x ^ _shift64(x, 31)


def _mix32_(x: torch.Tensor, scratch: torch.Tensor) -> None:
    """lowbias32 (C. Wellons, hash-prospector) on int32, in place."""
    for bits, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        torch.bitwise_right_shift(x, bits, out=scratch)
        x ^= scratch.bitwise_and_((1 << (32 - bits)) - 1)
        if multiplier != 1:
            x *= signed(multiplier, 32)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The 64-bit keys of rows: all [N] int64."""
    return _mix64(_mix64(seeds) + positions * signed(0x9E3779B97F4A7C15, 64))


def hash_tokens(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The 32-bit hash of (seed, position, token id).

    Args:
        seeds: [N] int64.
        positions: [N] int64.
        token_ids: [N, K] or [1, K], integers below 2**31.

    Returns:
        [N, K] int32, uniform over all values.
    """
    key = row_keys(seeds, positions).unsqueeze(1)
    x = token_ids.int() * signed(0x9E3779B1, 32) + key.int()
    scratch = torch.empty_like(x)
    _mix32_(x, scratch)
    x ^= (key >> 32).int()
    _mix32_(x, scratch)
    return x


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[N, K] float32 standard Gumbel noise, between -3.2 and 22.9; arguments as ``hash_tokens``."""
    uniform = hash_tokens(seeds, positions, token_ids).double().add_(2.0**31 + 0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().float()


def gumbel_argmax(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor | None = None,
    *,
    temperatures: torch.Tensor | None = None,
    least: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sample per row from softmax(logits / temperature): argmax(logits / temperature + noise).

    Equal scores go to the lowest token id. This is the specification; ``kernels.choose_tokens`` has faster ones.

    Args:
        logits: [N, V] float32, or [N, K] for a subset of tokens; -inf excludes a token.
        seeds: [N] int64.
        positions: [N] int64, index of the chosen token in its sequence.
        token_ids: [N, K] or [1, K] integers, the tokens the columns of ``logits`` stand for (None: 0 .. V - 1).
        temperatures: [N] float32, 0 for the largest logit without noise (None: all 1).
        least: [N] float32, excludes logits below it (``kernels.kept_thresholds``).
        allowed: [N, ceil(V / 32)] int32, bits of the columns that may be chosen (None: all).

    Returns:
        [N] int64 token ids.
    """
    if token_ids is None:
        token_ids = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0)
    if least is not None:
        logits = logits.masked_fill(logits < least.unsqueeze(1), -torch.inf)
    if allowed is not None:
        logits = logits.masked_fill(~unpack_bits(allowed, logits.shape[1]), -torch.inf)
    noise = gumbel_noise(seeds, positions, token_ids)
    if temperatures is not None:
        greedy = (temperatures == 0).unsqueeze(1)
        logits = logits / temperatures.unsqueeze(1).masked_fill(greedy, 1.0)
        noise = noise.masked_fill(greedy, 0.0)
    scores = logits + noise
    best = scores.amax(dim=1, keepdim=True)
    return torch.where(scores == best, token_ids.long(), torch.iinfo(torch.int64).max).amin(dim=1)
