"""What one run of ``benchmarks.speculation`` measures, on which prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.common.drafting import Drafting
from benchmarks.common.in_process import REQUESTS_EACH
from benchmarks.prompts.build import Prompt

REQUESTS_ALONE = 3


@dataclass(frozen=True)
class Plan:
    """What one run measures. ``seconds`` is its bound, divided equally among the models.

    ``levels``, ``rounds``, ``http`` and ``ignore_eos`` are for kind ``speed``, ``prompts`` (of each domain) for
    ``acceptance``, whose answers always end by themselves.
    """

    kind: Literal["speed", "acceptance"]
    models: list[str]
    modes: list[str]
    domains: list[str]
    levels: list[int]
    rounds: int
    prompts: int
    max_tokens: int
    ignore_eos: bool
    seconds: float
    drafting: Drafting
    http: bool

    def cells(self) -> Iterator[tuple[int, int, str]]:
        """(round, concurrency, domain) in order of measurement: a cut run lacks the last round's largest batches."""
        return (
            (number, level, domain) for number in range(self.rounds) for level in self.levels for domain in self.domains
        )


def chosen_prompts(prompts: Sequence[Prompt], level: int, number: int) -> list[Prompt]:
    """Those of a cell in one round: every round goes on where the last one ended."""
    count = REQUESTS_ALONE if level == 1 else REQUESTS_EACH * level
    return [prompts[(number * count + i) % len(prompts)] for i in range(count)]
