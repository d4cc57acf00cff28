"""What ``benchmarks.coupling`` saw at one position, and its means over many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.common.runs import ALL


@dataclass(frozen=True)
class Sample:
    """One rule at one position of one answer: expected acceptance up to each place."""

    temperature: float
    domain: str
    prompt: str
    rule: str
    reached: list[float]


@dataclass(frozen=True)
class Summary:
    """A rule's means over positions. ``error``: standard error of ``length``, prompts taken as independent."""

    temperature: float
    domain: str
    rule: str
    positions: int
    reached: list[float]
    length: float
    error: float


def summarise(samples: Sequence[Sample], temperature: float, domain: str, rule: str) -> Summary | None:
    """Means over the samples of one temperature and rule, and of one domain or ``ALL``; None where there is none."""
    wanted = [s for s in samples if (s.temperature, s.rule) == (temperature, rule) and domain in (ALL, s.domain)]
    if not wanted:
        return None
    by_prompt: dict[str, list[float]] = {}
    for sample in wanted:
        by_prompt.setdefault(sample.prompt, []).append(1 + sum(sample.reached))
    length = 1 + sum(sum(sample.reached) for sample in wanted) / len(wanted)
    # Of a ratio of sums: what each prompt adds to the sum, less what its positions would at the mean.
    residuals = [sum(lengths) - length * len(lengths) for lengths in by_prompt.values()]
    error = math.sqrt(sum(residual**2 for residual in residuals)) / len(wanted)
    reached = [fmean(column) for column in zip(*(sample.reached for sample in wanted), strict=True)]
    return Summary(temperature, domain, rule, len(wanted), reached, length, error)
