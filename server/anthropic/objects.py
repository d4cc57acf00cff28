"""What /v1/messages answers: the message, the events of its stream, and errors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import structlog

from server.errors import ApiError

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in the shape of Anthropic's API."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    type: str
    message: str


class ErrorMessage(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """Body of every response of /v1/messages with status 400 or higher."""

    error: ErrorDetail
    request_id: str | None = None


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
