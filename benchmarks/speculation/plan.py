"""What one run of ``benchmarks.speculation`` measures, on which prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.common.drafting import Drafting
from benchmarks.prompts.build import Prompt

REQUESTS_ALONE = 3
REQUESTS_EACH = 2
"""For each that is answered at the same time."""


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


def answer_lengths(count: int, mean: int) -> list[int]:
    """Tokens of each answer, from half of the mean to half as many more.

    Answers of the same length would all end together without drafts, so that there the batch is always full, and one by
    one with drafts, where fewer and fewer are left in the end: no server's users do that.
    """
    return [mean // 2 + 29 * index % (mean + 1) for index in range(count)]
