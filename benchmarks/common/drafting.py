"""What drafts, in benchmarks that compare ways to draft."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.in_process import engine_config
from evospec.engine.config import EngineConfig, SpeculationConfig

NONE = "none"
FIXED_LENGTH = 4
"""Draft tokens of a step where all have the same length: acceptance is comparable then."""


@dataclass(frozen=True)
class Drafting:
    """What drafts in the modes that speculate; fields as in ``SpeculationConfig``.

    ``num_tokens`` None: the engine's own most where lengths adapt, else ``FIXED_LENGTH``.
    """

    method: str = "eagle3"
    draft: str | None = None
    num_tokens: int | None = None
    adaptive: bool = False

    def config(self, model: str, vocabulary: str) -> EngineConfig:
        """The engine that drafts from a vocabulary, or with ``none`` not at all."""
        if vocabulary == NONE:
            return engine_config(model, SpeculationConfig(method="none"))
        most = SpeculationConfig().num_speculative_tokens
        options = {
            "method": self.method,
            "draft": self.draft,
            "vocabulary": vocabulary,
            "num_speculative_tokens": self.num_tokens or (most if self.adaptive else FIXED_LENGTH),
            "adaptive": self.adaptive,
        }
        return engine_config(model, SpeculationConfig.model_validate(options))
