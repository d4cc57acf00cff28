"""How many tokens of prompts a step may read so that sequences which wait for their next token get it in time."""

from __future__ import annotations

_MEMORY = 0.8
"""Weight of the past, for each step that reads prompts."""


class StepTime:
    """What a token has cost lately in steps that read prompts, all of their time shared by all of their tokens."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """A step that reads prompts has computed so many tokens in so long."""
        self._tokens = _MEMORY * self._tokens + num_tokens
        self._seconds = _MEMORY * self._seconds + seconds

    def tokens_in(self, seconds: float) -> int | None:
        """Tokens that take so long; None while nothing is known."""
        return int(seconds * self._tokens / self._seconds) if self._seconds > 0.0 else None
