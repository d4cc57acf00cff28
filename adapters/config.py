"""Typed options of the worker process. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from engine.adapters_config import AdaptersConfig
from engine.config import CONFIG_VARIABLE, EngineConfig

__all__ = ["CONFIG_VARIABLE", "WorkerConfig"]


class WorkerConfig(EngineConfig):
    """The engine's own configuration, from the same variable, so that both mean the same model, draft and adapters."""

    alignment: AdaptersConfig = Field(default_factory=AdaptersConfig)
