"""The texts of running sequences, in which repeats are found."""

from __future__ import annotations

from collections.abc import Iterable

from evospec.engine.draft_state import NONE, TEXT_BEFORE
from evospec.engine.request import Request
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import TokenRows

PROMPT_WINDOW = 4096
"""The last tokens of a prompt, which are looked at; fewer where there is a prediction, of which the first count."""
CAPACITY = 8192
"""Tokens of a text; beyond them the older half is forgotten."""


class RunningTexts:
    """Gives each sequence a text, as long as there is room, and keeps it in step with the sequence's tokens.

    An engine has one: a sequence's slot is in its ``DraftState``.

    Args:
        num_slots: most sequences with a text.
    """

    def __init__(self, num_slots: int) -> None:
        self.texts = Texts(num_slots, CAPACITY)
        self._free = list(range(num_slots))[::-1]

    def read(self, requests: Iterable[Request]) -> None:
        """Take the tokens that sequences have got since the last call."""
        rows = TokenRows()
        for request in requests:
            state, token_ids = request.draft_state, request.all_token_ids
            if state.text == NONE and self._free:
                self._begin(request, rows)
            if state.text != NONE and state.num_in_text < len(token_ids):
                rows.add(state.text, token_ids[state.num_in_text :])
                state.num_in_text = len(token_ids)
        if len(rows):
            self.texts.extend(rows)

    def _begin(self, request: Request, rows: TokenRows) -> None:
        """A text begins with what else may be copied: the session's earlier answers, and what is predicted."""
        state = request.draft_state
        state.text = self._free.pop()
        self.texts.clear(state.text)
        predicted = state.prediction[: PROMPT_WINDOW - TEXT_BEFORE]
        state.num_in_text = max(request.num_tokens - PROMPT_WINDOW + len(predicted), 0)
        if said := state.said:
            rows.add(state.text, said)
        if predicted:
            token_ids = [*request.prompt_token_ids[-TEXT_BEFORE:], *predicted]
            rows.add(state.text, token_ids)
            state.predicted = "".join(map(chr, token_ids))

    def take(self, request: Request, count: int) -> int:
        """The slot of the text to which the caller appends the next tokens of a sequence; NONE: ``read`` does that."""
        state = request.draft_state
        if state.text == NONE or state.num_in_text != len(request.all_token_ids):
            return NONE
        state.num_in_text += count
        return state.text

    def forget(self, request: Request) -> None:
        """A request has ended."""
        if request.draft_state.text != NONE:
            self._free.append(request.draft_state.text)
            request.draft_state.text = NONE
