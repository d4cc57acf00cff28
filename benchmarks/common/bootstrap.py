"""How sure a figure over prompts is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

_SAMPLES = 1000

Item = TypeVar("Item")


def interval(items: Sequence[Item], figure: Callable[[Sequence[Item]], float]) -> tuple[float, float, float]:
    """A figure of some items, and between what 95 of 100 samples of them have it (bootstrap)."""
    rng = random.Random(0)
    found = sorted(figure(rng.choices(items, k=len(items))) for _ in range(_SAMPLES))
    return figure(items), found[_SAMPLES // 40], found[-_SAMPLES // 40]
