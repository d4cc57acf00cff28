"""The texts of running sequences, in which repeats are found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evospec.engine.learner import Learner
from evospec.engine.request import Request
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import TokenRows

NONE = -1
"""No slot."""
TEXT_BEFORE = 16
"""Tokens of a prompt's end that come before an answer where it is kept or predicted: another one begins as it does."""
PROMPT_WINDOW = 4096
"""The last tokens of a prompt, which are looked at; fewer where there is a prediction, of which the first count."""
CAPACITY = 8192
"""Tokens of a text; beyond them the older half is forgotten."""


@dataclass(eq=False, slots=True)
class _Text:
    """What is known of a sequence."""

    slot: int = NONE
    num_read: int = 0
    """How many of its tokens are there, or are left out."""
    predicted: str = ""
    """The prompt's end and the client's prediction, a character a token, to find words in."""
    history: Sequence[int] = ()
    """The session's earlier answers."""


class RunningTexts(Learner):
    """Gives each sequence a text, as long as there is room, and keeps it in step with the sequence's tokens.

    Args:
        num_slots: most sequences with a text.
    """

    part = "lookup"

    def __init__(self, num_slots: int) -> None:
        self.texts = Texts(num_slots, CAPACITY)
        self._free = list(range(num_slots))[::-1]
        self._of: dict[Request, _Text] = {}

    def slots(self, requests: Iterable[Request]) -> list[int]:
        """The slot of each sequence; NONE: it has no text."""
        return [NONE if (text := self._of.get(request)) is None else text.slot for request in requests]

    def predicted(self, request: Request) -> str:
        """The prompt's end and the client's prediction, a character a token; empty without a prediction, or a text."""
        text = self._of.get(request)
        return "" if text is None else text.predicted

    def put_before(self, request: Request, history: Sequence[int]) -> None:
        """A sequence's text, which has not begun, is to begin with the session's earlier answers."""
        self._of.setdefault(request, _Text()).history = history

    def read(self, requests: Iterable[Request]) -> None:
        """Take the tokens that sequences have got since the last call."""
        rows = TokenRows()
        for request in requests:
            text, token_ids = self._of.setdefault(request, _Text()), request.all_token_ids
            if text.slot == NONE and self._free:
                self._start(request, text, rows)
            if text.slot != NONE and text.num_read < len(token_ids):
                rows.add(text.slot, token_ids[text.num_read :])
                text.num_read = len(token_ids)
        if len(rows):
            self.texts.extend(rows)

    def _start(self, request: Request, text: _Text, rows: TokenRows) -> None:
        """A text begins with what else may be copied: the session's earlier answers, and what is predicted."""
        text.slot = self._free.pop()
        self.texts.clear(text.slot)
        predicted = request.prediction[: PROMPT_WINDOW - TEXT_BEFORE]
        text.num_read = max(request.num_tokens - PROMPT_WINDOW + len(predicted), 0)
        if text.history:
            rows.add(text.slot, text.history)
        if predicted:
            token_ids = [*request.prompt_token_ids[-TEXT_BEFORE:], *predicted]
            rows.add(text.slot, token_ids)
            text.predicted = "".join(map(chr, token_ids))

    def take(self, request: Request, count: int) -> int:
        """The slot of the text to which the caller appends the next tokens of a sequence; NONE: ``read`` does that."""
        text = self._of.get(request)
        if text is None or text.slot == NONE or text.num_read != len(request.all_token_ids):
            return NONE
        text.num_read += count
        return text.slot

    def end(self, request: Request) -> None:
        text = self._of.pop(request, None)
        if text is not None and text.slot != NONE:
            self._free.append(text.slot)
