"""What drafts, in benchmarks that compare ways to draft; their options for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks.common.in_process import engine_config
from engine.config import MAX_SPECULATIVE_TOKENS, EngineConfig, SpeculationConfig

NONE = "none"
FIXED_LENGTH = 4
"""Draft tokens of a step where all have the same length: acceptance is comparable then."""
DraftLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_SPECULATIVE_TOKENS,
        help=f"Draft tokens of a step; default: {FIXED_LENGTH} where all have the same length, else the engine's most.",
    ),
]
"""Option ``--length`` of the benchmarks."""


@dataclass(frozen=True)
class Drafting:
    """What drafts in the modes that speculate; fields as in ``SpeculationConfig``."""

    method: str
    draft: str | None
    num_tokens: int
    adaptive: bool

    @classmethod
    def of(cls, method: str, draft: str | None, length: int | None, *, adaptive: bool) -> Drafting:
        """``length`` None: the engine's own most where lengths adapt, else ``FIXED_LENGTH``."""
        return cls(
            method,
            draft,
            length or (SpeculationConfig().num_speculative_tokens if adaptive else FIXED_LENGTH),
            adaptive,
        )

    def config(self, model: str, vocabulary: str) -> EngineConfig:
        """The engine that drafts from a vocabulary, or with ``none`` not at all."""
        if vocabulary == NONE:
            return engine_config(model, SpeculationConfig(method="none"))
        options = {
            "method": self.method,
            "draft": self.draft,
            "vocabulary": vocabulary,
            "num_speculative_tokens": self.num_tokens,
            "adaptive": self.adaptive,
        }
        return engine_config(model, SpeculationConfig.model_validate(options))
