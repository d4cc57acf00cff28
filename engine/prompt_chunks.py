"""How many tokens of prompts a step reads, and of each. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from evospec.engine.request import Request

MOST_PROMPT_ROWS = 256
"""Prompt tokens of a step whose logits are wanted: each takes memory as wide as the vocabulary."""
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


def prompt_rows_left(plan: Mapping[Request, int], num_drafts: int, most_extra_rows: int) -> int:
    """Rows of logits of prompts that a step may compute beside its plan, which has so many tokens of each request.

    ``num_drafts``: how many of these are drafts. ``most_extra_rows``: of prompts and drafts.
    """
    num_planned = sum(number for request, number in plan.items() if request.wants_prompt_logits)
    return min(MOST_PROMPT_ROWS, most_extra_rows - num_drafts) - num_planned


def share_out(lengths: Mapping[Request, int], num_tokens: int, num_rows: int) -> dict[Request, int]:
    """Tokens for each prompt, in equal parts, as far as they need them.

    ``lengths``: of what is left of each. ``num_rows``: most tokens of prompts whose logits are wanted.
    """
    with_rows = {request: length for request, length in lengths.items() if request.wants_prompt_logits}
    others = {request: length for request, length in lengths.items() if request not in with_rows}
    part = -(-num_tokens * len(with_rows) // max(len(lengths), 1))
    chunks = _in_equal_parts(with_rows, min(part, num_rows))
    return chunks | _in_equal_parts(others, num_tokens - sum(chunks.values()))


def _in_equal_parts(lengths: Mapping[Request, int], num_tokens: int) -> dict[Request, int]:
    chunks: dict[Request, int] = {}
    for position, request in enumerate(sorted(lengths, key=lengths.__getitem__)):
        if num_tokens == 0:
            break
        chunks[request] = min(lengths[request], -(-num_tokens // (len(lengths) - position)))
        num_tokens -= chunks[request]
    return chunks
