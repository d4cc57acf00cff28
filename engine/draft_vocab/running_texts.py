"""The texts of running sequences, in which repeats are found, for prompt lookup and for the prior."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.request import Request
from kernels.native_texts import Texts

PROMPT_WINDOW = 4096
"""The last tokens of a prompt, which are looked at."""
CAPACITY = 8192
"""Tokens of a text; beyond them the older half is forgotten."""


class RunningTexts:
    """Gives each sequence a text, as long as there is room, and keeps it in step with the sequence's tokens.

    Args:
        num_slots: most sequences with a text.
    """

    def __init__(self, num_slots: int) -> None:
        self.texts = Texts(num_slots, CAPACITY)
        self._free = list(range(num_slots))[::-1]
        self._slots: dict[str, int] = {}
        self._num_read: dict[str, int] = {}

    def read(self, requests: Iterable[Request]) -> None:
        """Take the tokens that sequences have got since the last call."""
        slots, tokens = [], []
        for request in requests:
            slot, num_read = self._slots.get(request.request_id), self._num_read.get(request.request_id, 0)
            if slot is None:
                if not self._free:
                    continue
                slot = self._slots[request.request_id] = self._free.pop()
                self.texts.clear(slot)
                num_read = max(request.num_tokens - PROMPT_WINDOW, 0)
            if num_read < request.num_tokens:
                slots.append(slot)
                tokens.append(request.all_token_ids[num_read:])
                self._num_read[request.request_id] = request.num_tokens
        if slots:
            self.texts.extend(slots, tokens)

    def slots(self, requests: Sequence[Request]) -> list[int]:
        """Of each sequence, -1 for one without a text."""
        return [self._slots.get(request.request_id, -1) for request in requests]

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
            del self._num_read[request_id]
