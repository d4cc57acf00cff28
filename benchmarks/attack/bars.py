"""What an attack's figures must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A figure's least and greatest value. ``of_before``: not of the figure itself, but of it over that of before."""

    least: float = -math.inf
    most: float = math.inf
    of_before: bool = False

    def holds(self, value: float, before: float | None = None) -> bool | None:
        """Whether ``value`` is as it must be; None where that needs a figure of ``before`` that there is not."""
        if self.of_before:
            if before is None:
                return None
            value /= before
        return self.least <= value <= self.most

    def __str__(self) -> str:
        unit = " of before" if self.of_before else ""
        if self.least == self.most:
            return f"= {self.least:g}{unit}"
        parts = [f"≥ {self.least:g}"] * (self.least > -math.inf) + [f"≤ {self.most:g}"] * (self.most < math.inf)
        return ", ".join(parts) + unit


def at_most(value: float) -> Bar:
    return Bar(most=value)


def exactly(value: float) -> Bar:
    return Bar(value, value)


Bars = Mapping[str, Bar]
"""By the figure that each is about."""
