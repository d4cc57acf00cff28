"""What all sections of options have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Options of one subject."""

    model_config = ConfigDict(extra="forbid")

    in_code_only: ClassVar[frozenset[str]] = frozenset()
    """Options of experiments, which are set in code: flags, environment and configuration files do not know them."""
