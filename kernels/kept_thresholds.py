"""Where top-k, then top-p, then min-p cut a distribution off: the smallest logit that is kept.

All three keep the tokens whose logit reaches some threshold. Tokens that tie with the last one kept are kept as well:
bfloat16 logits tie often, and the kept set must not depend on how a sort orders equals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# How many of a row's largest logits are looked at: few first, all at last.
_FEW, _MANY = 256, 4096
_ROOM_FOR_TIES = 16


@dataclass(frozen=True)
class Limits:
    """Limits of each row, tensors [N]: int32, float64, float64. Off are top_k 0, top_p 1 and min_p 0."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def unpack_bits(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[N, ceil(num_bits / 32)] int32 → [N, num_bits] bool; bit 0 of word 0 comes first (the layout of xgrammar)."""
    bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :num_bits].bool()


def kept_thresholds(
    logits: torch.Tensor, temperatures: torch.Tensor, limits: Limits, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """The smallest logit of each row that its limits keep.

    Looks at some hundred candidates first, and at more only in rows where those do not hold every kept token.

    Args:
        logits: [N, V] float32, not divided by the temperature.
        temperatures: [N] float32; 0 is greedy, where nothing is cut off.
        limits: the rows' limits.
        allowed: [N, ceil(V / 32)] int32, bits of the columns that count (None: all).

    Returns:
        [N] float32, -inf where nothing is cut off.
    """
    if allowed is not None:
        logits = logits.masked_fill(~unpack_bits(allowed, logits.shape[1]), -torch.inf)
    vocab_size = logits.shape[1]
    no_noise = temperatures == 0
    temperatures = temperatures.masked_fill(no_noise, 1.0)
    least = torch.empty_like(temperatures)
    rows = torch.arange(len(logits), device=logits.device)
    largest_k = int(limits.top_k.masked_fill(limits.top_k >= vocab_size, 0).amax())
    for num_candidates in (max(_FEW, largest_k + _ROOM_FOR_TIES), _MANY, vocab_size):
        if len(rows):
            values = logits[rows].topk(min(num_candidates, vocab_size), dim=1).values
            total = 1.0 / (logits[rows] / temperatures[rows].unsqueeze(1)).softmax(dim=1).amax(dim=1).double()
            least[rows] = _threshold(values, total, temperatures[rows], limits[rows], vocab_size)
            rows = rows[values[:, -1] >= least[rows]]  # equals may have been left out
    return least.masked_fill(no_noise, -torch.inf)


def _threshold(
    values: torch.Tensor, total: torch.Tensor, temperatures: torch.Tensor, limits: Limits, vocab_size: int
) -> torch.Tensor:
    """The smallest logit kept in each row, [N] float32; -inf where the candidates cannot tell.

    Args:
        values: [N, K] float32, the largest logits in descending order.
        total: [N] float64, sum of exp((logit - largest logit) / temperature) over the whole row.
        temperatures: [N] float32, above 0.
        limits: the rows' limits.
        vocab_size: a top_k of this size is off.
    """
    # Sums are in float64, so that neither K nor the order of summation moves a threshold.
    num_candidates = values.shape[1]
    has_top_k = (limits.top_k > 0) & (limits.top_k < vocab_size)
    last = limits.top_k.long().clamp(1, num_candidates) - 1
    kth = values.gather(1, last.unsqueeze(1)).squeeze(1)
    # Whether the k-th is among the candidates, and all that tie with it.
    is_known = ~has_top_k | (values[:, -1] < kth) if num_candidates < vocab_size else torch.ones_like(has_top_k)
    kth = torch.where(has_top_k, kth, -torch.inf)

    exponents = (values - values[:, :1]).double() / temperatures.double().unsqueeze(1)
    mass = exponents.exp().masked_fill(values < kth.unsqueeze(1), 0.0).cumsum(dim=1)
    total = torch.where(has_top_k, mass[:, -1], total)
    reached = mass >= (limits.top_p * total).unsqueeze(1)
    nucleus_end = values.gather(1, reached.int().argmax(dim=1, keepdim=True)).squeeze(1)
    nucleus_end = torch.where(reached[:, -1] & (limits.top_p < 1.0), nucleus_end, -torch.inf)
    min_p_bound = values[:, 0] + temperatures * limits.min_p.log().float()
    return torch.maximum(torch.maximum(kth, nucleus_end), min_p_bound).masked_fill(~is_known, -torch.inf)
