"""The texts of running sequences, in which repeats are found, for prompt lookup and for the prior."""

from __future__ import annotations

from collections.abc import Iterable

from engine.draft_state import NONE
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

    def read(self, requests: Iterable[Request]) -> None:
        """Take the tokens that sequences have got since the last call."""
        slots, tokens = [], []
        for request in requests:
            state = request.draft_state
            if state.text == NONE:
                if not self._free:
                    continue
                state.text = self._free.pop()
                self.texts.clear(state.text)
                state.num_in_text = max(request.num_tokens - PROMPT_WINDOW, 0)
            if state.num_in_text < request.num_tokens:
                slots.append(state.text)
                tokens.append(request.all_token_ids[state.num_in_text :])
                state.num_in_text = request.num_tokens
        if slots:
            self.texts.extend(slots, tokens)

    def forget(self, request: Request) -> None:
        """A request has ended."""
        if request.draft_state.text != NONE:
            self._free.append(request.draft_state.text)
            request.draft_state.text = NONE
