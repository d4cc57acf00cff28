"""From the text of one choice to the assistant's message, whole or as the deltas of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from msgspec import UNSET

from server.generation import Piece
from server.schemas.chat import AssistantMessage, Delta, FinishReason
from server.schemas.tools import CalledFunction, FunctionDelta, ToolCall, ToolCallDelta
from server.tools.answer_parser import AnswerParser, AnswerPart, CallPart
from server.tools.blocks import is_ended_by_model
from server.tools.chat_format import ChatFormat


class MessageWriter:
    """Writes the message of one choice: by ``message``, or by ``delta`` for each of its pieces.

    Args:
        form: how the model writes answers.
        with_calls: whether it was given tools.
        is_thinking: whether the prompt has begun its thoughts.
    """

    def __init__(self, form: ChatFormat, with_calls: bool, is_thinking: bool) -> None:
        self._parser = AnswerParser(form, with_calls, is_thinking)
        self._has_calls = False

    def message(self, pieces: Sequence[Piece]) -> AssistantMessage:
        """The whole message."""
        part = self._parse("".join(piece.text for piece in pieces), is_last=True)
        return AssistantMessage(
            content=part.content or (None if part.calls else ""),
            reasoning_content=part.reasoning or UNSET,
            tool_calls=[
                ToolCall(id=_new_id(), function=CalledFunction(call.name, call.arguments)) for call in part.calls
            ]
            or UNSET,
        )

    def delta(self, piece: Piece) -> Delta | None:
        """What a piece adds to the message; None if that is nothing."""
        part = self._parse(piece.text, is_last=piece.finish_reason is not None)
        if not (part.content or part.reasoning or part.calls or piece.is_first):
            return None
        is_empty = not part.reasoning and not part.calls
        return Delta(
            role="assistant" if piece.is_first else UNSET,
            content=part.content if part.content or is_empty else UNSET,
            reasoning_content=part.reasoning or UNSET,
            tool_calls=[_call_delta(call) for call in part.calls] or UNSET,
        )

    def finish_reason(self, piece: Piece) -> FinishReason | None:
        """Why the choice ends with this piece, if it does: for its calls, unless it was cut off."""
        return "tool_calls" if is_ended_by_model(piece) and self._has_calls else piece.finish_reason

    def _parse(self, text: str, is_last: bool) -> AnswerPart:
        part = self._parser.push(text, is_last)
        self._has_calls |= bool(part.calls)
        return part


def _call_delta(call: CallPart) -> ToolCallDelta:
    if not call.name:
        return ToolCallDelta(index=call.index, function=FunctionDelta(arguments=call.arguments))
    function = FunctionDelta(call.name, call.arguments)
    return ToolCallDelta(index=call.index, id=_new_id(), type="function", function=function)


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"
