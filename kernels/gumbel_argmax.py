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

# Logits this far below the largest are scored only if their hash is large enough.
_HEAD_WIDTH = 8.0
# Hashes computed at a time: 1 MiB of int32.
_CHUNK = 1 << 18


def _signed(value: int, bits: int) -> int:
    """The two's-complement reading of an integer: the same modulo 2**bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def seeds_tensor(seeds: list[int], device: torch.device | None = None) -> torch.Tensor:
    """[N] int64 from seeds of any size; their lowest 64 bits count."""
    return torch.tensor([_signed(seed, 64) for seed in seeds], dtype=torch.int64, device=device)


def _shift64(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64."""
    x = (x ^ _shift64(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift64(x, 27)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift64(x, 31)


def _mix32_(x: torch.Tensor, scratch: torch.Tensor) -> None:
    """lowbias32 (C. Wellons, hash-prospector) on int32, in place: this is most of the cost of sampling."""
    for bits, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        torch.bitwise_right_shift(x, bits, out=scratch)
        x ^= scratch.bitwise_and_((1 << (32 - bits)) - 1)
        if multiplier != 1:
            x *= _signed(multiplier, 32)


def hash_tokens(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The 32-bit hash of (seed, position, token id).

    Args:
        seeds: [N] int64.
        positions: [N] int64.
        token_ids: [N, K] or [1, K], integers below 2**31.

    Returns:
        [N, K] int32, uniform over all values.
    """
    key = _mix64(_mix64(seeds) + positions * _signed(0x9E3779B97F4A7C15, 64)).unsqueeze(1)
    x = token_ids.int() * _signed(0x9E3779B1, 32) + key.int()
    scratch = torch.empty_like(x)
    _mix32_(x, scratch)
    x ^= (key >> 32).int()
    _mix32_(x, scratch)
    return x


def _to_gumbel(hashes: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 between -3.2 and 22.9; it grows with the hash."""
    return hashes.double().add_(2.0**31 + 0.5).mul_(2.0**-32).log_().neg_().log_().neg_().float()


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[N, K] float32 standard Gumbel noise; arguments as ``hash_tokens``."""
    return _to_gumbel(hash_tokens(seeds, positions, token_ids))


def gumbel_argmax_reference(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """The specification of ``gumbel_argmax``, with ``token_ids`` [N, K] or [1, K] given."""
    scores = logits + gumbel_noise(seeds, positions, token_ids)
    best = scores.amax(dim=1, keepdim=True)
    return torch.where(scores == best, token_ids, torch.iinfo(torch.int64).max).amin(dim=1)


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
    if token_ids is not None:
        return gumbel_argmax_reference(logits, seeds, positions, token_ids)
    # A few rows at a time, so that the hash stays in the processor's cache.
    rows = max(1, _CHUNK // logits.shape[1])
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device).unsqueeze(0)
    chunks = [slice(start, start + rows) for start in range(0, len(logits), rows)]
    return torch.cat([_argmax_over_vocabulary(logits[c], seeds[c], positions[c], columns) for c in chunks])


def _argmax_over_vocabulary(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, all_token_ids: torch.Tensor
) -> torch.Tensor:
    """As the reference over all tokens, but takes logarithms only where they can matter.

    The most likely token's score is a lower bound of the best. A token more than ``_HEAD_WIDTH``
    below it in logits can only win with noise that exceeds the bound's by as much, and that is
    seen from its hash.
    """
    num_rows, vocab_size = logits.shape
    hashes = hash_tokens(seeds, positions, all_token_ids)
    highest, best = logits.max(dim=1, keepdim=True)
    room_for_rounding = 1e-3 + highest.double().abs() * 2.0**-20
    needed = _to_gumbel(hashes.gather(1, best)).double() + _HEAD_WIDTH - room_for_rounding
    least_hash = ((-(-needed).exp()).exp() * 2.0**32 - 2.0**31 - 1).clamp(min=-(2.0**31)).int()
    rows, columns = ((logits >= highest - _HEAD_WIDTH) | (hashes >= least_hash)).nonzero(as_tuple=True)

    scores = logits[rows, columns] + _to_gumbel(hashes[rows, columns])
    top = scores.new_full((num_rows,), -torch.inf).scatter_reduce(0, rows, scores, "amax")
    wins = scores == top[rows]
    return rows.new_full((num_rows,), vocab_size).scatter_reduce(0, rows[wins], columns[wins], "amin")
