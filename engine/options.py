"""What all sections of options have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Options of one subject. What stands below one is its description in ``--help`` and the documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    in_code_only: ClassVar[frozenset[str]] = frozenset()
    """Options of experiments, which are set in code: flags, environment and configuration files do not know them."""
