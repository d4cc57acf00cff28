"""Which of the sequences that end in one step their sessions keep: each takes milliseconds, and all others wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from evospec.engine.request import Request

MAX_OF_PROMPT = 4
"""Choices of a request that end together say much the same: what others say is lost to their session."""
MAX_BEGUN = 16
"""Sequences of a tenant that never had a vocabulary: their whole texts are read when they end."""
_END = 1024
"""Tokens of prompts by which they are told apart, besides how many they have."""


class StepEnds:
    """Counts the sequences that are kept in a step, by prompts and tenants."""

    def __init__(self) -> None:
        self._kept = Counter[Hashable]()

    def clear(self) -> None:
        """Another step begins."""
        self._kept.clear()

    def take(self, request: Request, has_vocabulary: bool) -> bool:
        """Whether one more is kept, of a sequence that has a session and ends in this step."""
        prompt = request.prompt_token_ids
        limits: dict[Hashable, int] = {
            (request.tenant, request.domain, len(prompt), *prompt[-_END:]): MAX_OF_PROMPT,
        }
        if not has_vocabulary:
            limits[request.tenant] = MAX_BEGUN
        is_kept = all(self._kept[what] < limit for what, limit in limits.items())
        if is_kept:
            self._kept.update(limits.keys())
        return is_kept
