"""How many tokens a step may have so that sequences which wait for their next token get it in time."""

from __future__ import annotations

_MEMORY = 0.9
"""Weight of the past, for each step."""
_ORIGIN = 0.05
"""Weight of a step without tokens that takes no time: it decides where all steps have had the same size."""


class StepTime:
    """What steps have taken lately: a constant and so much for each token, by least squares that fade."""

    def __init__(self) -> None:
        self._steps = self._tokens = self._seconds = self._squares = self._products = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """A step has computed so many tokens in so long."""
        self._steps = _MEMORY * self._steps + 1.0
        self._tokens = _MEMORY * self._tokens + num_tokens
        self._seconds = _MEMORY * self._seconds + seconds
        self._squares = _MEMORY * self._squares + num_tokens * num_tokens
        self._products = _MEMORY * self._products + num_tokens * seconds

    def tokens_in(self, seconds: float) -> int | None:
        """Tokens that a step is likely to compute in so long; None while nothing is known."""
        count = self._steps + _ORIGIN
        tokens, taken = self._tokens / count, self._seconds / count
        variance, covariance = self._squares / count - tokens**2, self._products / count - tokens * taken
        if variance <= 0.0 or covariance <= 0.0:
            return None
        return int(tokens + (seconds - taken) * variance / covariance)
