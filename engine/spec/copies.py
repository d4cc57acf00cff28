"""Drafts that cost nothing: what followed the longest repeat of a sequence's end in its own prompt and answer.

Prompt lookup decoding (Saxena 2023), for the sequences and steps in which it promises more than the draft does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import Request
from engine.spec.length_policy import Repeat
from engine.vocab.text_matches import TextIndex, copied, make_text_index
from kernels.native_chain import SURENESS_LEVELS

MIN_MATCH = 3
"""Fewest tokens at the text's end that must have come before."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens that may come next. The more agreed before one, the surer it is."""

    token_ids: list[int]
    repeat: Repeat


class Copier:
    """Keeps an index of each running sequence's text.

    Args:
        window: how many of a prompt's last tokens are looked at; None: all.
    """

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._texts: dict[str, tuple[TextIndex, int]] = {}
        """With the place of the index's first token in the sequence."""

    def look(self, requests: Sequence[Request], limits: Sequence[int]) -> dict[str, Copy]:
        """For the sequences whose last ``MIN_MATCH`` tokens came before: what followed the longest repeat."""
        copies = {}
        for request, limit in zip(requests, limits, strict=True):
            if limit > 0:
                text, first = self._text(request)
                place, length = text.longest()
                if length >= MIN_MATCH:
                    levels = [min(length + number, SURENESS_LEVELS) - 1 for number in range(limit)]
                    repeat = Repeat(levels, request.sampling.temperature == 0.0)
                    copies[request.request_id] = Copy(copied(request.all_token_ids, first + place, limit), repeat)
        return copies

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._texts.pop(request_id, None)

    def _text(self, request: Request) -> tuple[TextIndex, int]:
        if request.request_id not in self._texts:
            first = 0 if self._window is None else max(request.num_tokens - self._window, 0)
            self._texts[request.request_id] = make_text_index(), first
        text, first = self._texts[request.request_id]
        text.extend(request.all_token_ids[first + len(text) :])
        return text, first
