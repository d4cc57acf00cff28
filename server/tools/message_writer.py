"""From the text of one choice to the assistant's message, whole or as the deltas of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from msgspec import UNSET

from evospec.server.generation import Piece
from evospec.server.schemas.chat import AssistantMessage, Delta, FinishReason
from evospec.server.schemas.tools import CalledFunction, FunctionDelta, ToolCall, ToolCallDelta
from evospec.server.tools.answer_parser import AnswerParser, Kind, Part


class MessageWriter:
    """Writes the message of one choice: by ``message``, or by ``delta`` for each of its pieces."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._num_calls = 0

    def message(self, pieces: Sequence[Piece]) -> AssistantMessage:
        """The whole message."""
        parts = self._parser.push("".join(piece.text for piece in pieces), is_last=True)
        called = [CalledFunction(part.name, part.text) for part in parts if part.kind == "call"]
        self._num_calls = len(called)
        return AssistantMessage(
            content=_text_of(parts, "text") or (None if called else ""),
            reasoning_content=_text_of(parts, "thoughts") or UNSET,
            tool_calls=[ToolCall(id=_new_id(), function=function) for function in called] or UNSET,
        )

    def delta(self, piece: Piece) -> Delta | None:
        """What a piece adds to the message; None if that is nothing."""
        parts = self._parser.push(piece.text, is_last=piece.finish_reason is not None)
        if not parts and not piece.is_first:
            return None
        content = _text_of(parts, "text")
        return Delta(
            role="assistant" if piece.is_first else UNSET,
            content=content if content or not parts else UNSET,
            reasoning_content=_text_of(parts, "thoughts") or UNSET,
            tool_calls=[self._call_delta(part) for part in parts if part.kind == "call"] or UNSET,
        )

    def finish_reason(self, piece: Piece) -> FinishReason | None:
        """Why the choice ends with this piece, if it does: for its calls, unless it was cut off."""
        return "tool_calls" if piece.is_ended_by_model and self._num_calls else piece.finish_reason

    def _call_delta(self, part: Part) -> ToolCallDelta:
        if not part.name:
            return ToolCallDelta(index=self._num_calls - 1, function=FunctionDelta(arguments=part.text))
        self._num_calls += 1
        function = FunctionDelta(part.name, part.text)
        return ToolCallDelta(index=self._num_calls - 1, id=_new_id(), type="function", function=function)


def _text_of(parts: Sequence[Part], kind: Kind) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"
