"""What /v1/messages answers: the whole message, the events of its stream, and errors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import structlog

from evospec.server.answer import BlocksAnswer
from evospec.server.errors import ApiError
from evospec.server.sse import named_event
from evospec.server.tools.blocks import Block, Change

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorCause(msgspec.Struct, frozen=True):
    """What went wrong."""

    type: str
    message: str


class ErrorMessage(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """Body of every response of /v1/messages with status 400 or higher."""

    error: ErrorCause
    request_id: str | None = None

    @classmethod
    def of(cls, error: ApiError) -> ErrorMessage:
        """An error in the shape of Anthropic's API."""
        kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        request_id = structlog.contextvars.get_contextvars().get("request_id")
        return cls(ErrorCause(kind, error.message), request_id)


class TextContent(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Text for the user."""

    text: str
    citations: None = None


class ThinkingContent(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """What the model thought before it answered. Nothing is signed."""

    thinking: str
    signature: str = ""


class ToolUseContent(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call for the client to make. Its result goes into a block tool_result with this ``id``."""

    id: str
    name: str
    input: dict[str, Any]


Content = TextContent | ThinkingContent | ToolUseContent


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """``input_tokens`` are those that were computed; the others of the prompt came from the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """An answer. A call that was cut off is not in ``content``; ``stop_reason`` tells of it."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Content]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a stream; which fields it has depends on its ``type``."""

    type: str
    message: MessageObject | None = None
    index: int | None = None
    content_block: Content | None = None
    delta: dict[str, Any] | None = None
    usage: MessageUsage | None = None


class TokenCount(msgspec.Struct, frozen=True):
    """Tokens of a conversation, as the model would see it."""

    input_tokens: int


class MessagesAnswer(BlocksAnswer):
    """Answers a conversation as Anthropic's API does."""

    def whole(self) -> MessageObject:
        """The message with all of its content."""
        blocks = self._writer.blocks
        content = [_content(block) for block in blocks if block.kind != "call" or block.arguments() is not None]
        return self._message(content, self._stop_reason(), self._stop_sequence())

    def begin(self) -> bytes:
        """The message without content."""
        return _event("message_start", message=self._message([], None, None)) + _event("ping")

    def change(self, change: Change) -> bytes:
        """A block of the content begins, goes on or ends."""
        index = change.block.index
        match change.kind:
            case "begin":
                return _event("content_block_start", index=index, content_block=_content(change.block))
            case "more":
                return _event("content_block_delta", index=index, delta=_delta(change.block, change.text))
            case "end":
                return _event("content_block_stop", index=index)

    async def end(self) -> bytes:
        """Why the message ends, and its usage."""
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        return _event("message_delta", delta=delta, usage=self._usage()) + _event("message_stop")

    def encode_failure(self, error: ApiError) -> bytes:
        """An event with the error."""
        return named_event("error", ErrorMessage.of(error))

    def _message(self, content: list[Content], reason: StopReason | None, sequence: str | None) -> MessageObject:
        return MessageObject(
            id=f"msg_{self._generation.id}",
            model=self._model,
            content=content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
        )

    def _stop_reason(self) -> StopReason:
        assert self._last is not None
        if self._last.finish_reason == "length":
            return "max_tokens"
        if isinstance(self._last.stop_reason, str):
            return "stop_sequence"
        has_calls = any(block.kind == "call" and block.arguments() is not None for block in self._writer.blocks)
        return "tool_use" if has_calls and self._last.is_ended_by_model else "end_turn"

    def _stop_sequence(self) -> str | None:
        assert self._last is not None
        return self._last.stop_reason if isinstance(self._last.stop_reason, str) else None

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
        )


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, MessageEvent(type=kind, **fields))


def _content(block: Block) -> Content:
    match block.kind:
        case "text":
            return TextContent(block.text)
        case "thoughts":
            return ThinkingContent(block.text)
        case "call":
            return ToolUseContent(f"toolu_{block.id}", block.name, block.arguments() or {})


def _delta(block: Block, text: str) -> dict[str, str]:
    match block.kind:
        case "text":
            return {"type": "text_delta", "text": text}
        case "thoughts":
            return {"type": "thinking_delta", "thinking": text}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}
