"""Drafts that cost nothing: what followed the longest repeat of a sequence's end in its own prompt and answer.

Prompt lookup decoding (Saxena 2023), for the sequences and steps in which it promises more than the draft does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import Request
from engine.spec.length_policy import Repeat
from engine.vocab.running_texts import RunningTexts
from kernels.native_chain import SURENESS_LEVELS

MIN_MATCH = 3
"""Fewest tokens at the text's end that must have come before."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens that may come next. The more agreed before one, the surer it is."""

    token_ids: list[int]
    repeat: Repeat


class Copier:
    """Finds what the ends of running sequences repeat.

    Args:
        texts: of the sequences.
    """

    def __init__(self, texts: RunningTexts) -> None:
        self._texts = texts

    def look(self, requests: Sequence[Request], limits: Sequence[int]) -> dict[str, Copy]:
        """For the sequences whose last ``MIN_MATCH`` tokens came before: what followed the longest repeat."""
        wanted = [(request, limit) for request, limit in zip(requests, limits, strict=True) if limit > 0]
        self._texts.read(request for request, _ in wanted)
        slots = self._texts.slots([request for request, _ in wanted])
        rows = [(slot, *one) for slot, one in zip(slots, wanted, strict=True) if slot >= 0]
        if not rows:
            return {}
        tokens, lengths = self._texts.texts.copy([slot for slot, *_ in rows], max(limits))
        copies = {}
        for (_, request, limit), copied, length in zip(rows, tokens, lengths, strict=True):
            if length >= MIN_MATCH:
                levels = [min(length + number, SURENESS_LEVELS) - 1 for number in range(limit)]
                repeat = Repeat(levels, request.sampling.temperature == 0.0)
                copies[request.request_id] = Copy(copied[:limit], repeat)
        return copies

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._texts.forget(request_id)
