"""The answer of /v1/messages: the whole message, or the events of its stream."""

from __future__ import annotations

from typing import Any

from server.anthropic.objects import (
    Content,
    MessageEvent,
    MessageObject,
    MessageUsage,
    StopReason,
    TextContent,
    ThinkingContent,
    ToolUseContent,
    error_body,
)
from server.blocks_answer import BlocksAnswer
from server.errors import ApiError
from server.sse import named_event
from server.tools.blocks import Begin, Block, Change, End, More, is_ended_by_model


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
        match change:
            case Begin():
                return _event("content_block_start", index=index, content_block=_content(change.block))
            case More():
                return _event("content_block_delta", index=index, delta=_delta(change.block, change.text))
            case End():
                return _event("content_block_stop", index=index)

    async def end(self) -> bytes:
        """Why the message ends, and its usage."""
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        return _event("message_delta", delta=delta, usage=self._usage()) + _event("message_stop")

    def encode_failure(self, error: ApiError) -> bytes:
        """An event with the error."""
        return named_event("error", error_body(error))

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
        return "tool_use" if has_calls and is_ended_by_model(self._last) else "end_turn"

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
