"""Pearson's chi-square test, for the statistical tests."""

from __future__ import annotations

import torch


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chance of counts at least this far from ``probabilities``; 0 if something impossible occurred.

    Values expected fewer than 5 times are pooled.
    """
    counts, expected = counts.double().flatten(), probabilities.double().flatten() * counts.sum()
    if counts[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)])
        expected = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)])
        counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))
