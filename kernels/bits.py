"""Masks of the vocabulary, 32 tokens in an int32 (the layout of xgrammar)."""

from __future__ import annotations

import torch


def unpack_bits(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[N, ceil(num_bits / 32)] int32 → [N, num_bits] bool; bit 0 of word 0 comes first."""
    bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :num_bits].bool()
