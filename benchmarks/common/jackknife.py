"""How sure a figure is that is taken over prompts or requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean


def jackknife_error(estimates: Sequence[float]) -> float:
    """Standard error, from the estimates that leave out each observation in turn; of two or more."""
    count, middle = len(estimates), fmean(estimates)
    return math.sqrt((count - 1) / count * sum((estimate - middle) ** 2 for estimate in estimates))
