"""From a request of /v1/messages to a request of chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server.anthropic.request import (
    ContentBlock,
    CountTokensRequest,
    CustomTool,
    InputMessage,
    MessagesRequest,
    OutputConfig,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from server.anthropic.request import ToolChoice as Choice
from server.chat_generation import chat_request
from server.schemas.chat import ChatCompletionRequest, text_of
from server.schemas.constraints import JsonSchemaFormat, JsonSchemaSpec
from server.schemas.tools import Function, FunctionName, NamedChoice, PastCall, Tool, ToolChoice


def to_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    """The same request for chat; raises ``ApiError`` 400 if there is none."""
    config = body.output_config or OutputConfig()
    return chat_request(
        body,
        messages=list(_messages(body)),
        max_tokens=body.max_tokens if isinstance(body, MessagesRequest) else None,
        stop=body.stop_sequences if isinstance(body, MessagesRequest) else None,
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=False if body.tool_choice and body.tool_choice.disable_parallel_tool_use else None,
        response_format=_format(config),
        reasoning_effort=config.effort,
        chat_template_kwargs=_thinking(body.thinking),
        user=body.user or _user(body),
    )


def _messages(body: CountTokensRequest) -> Iterator[dict[str, Any]]:
    if body.system:
        yield {"role": "system", "content": text_of(body.system)}
    for message in body.messages:
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield _assistant(message.content)
        else:
            yield from _with_results(message, message.content)


def _assistant(blocks: list[ContentBlock]) -> dict[str, Any]:
    calls = [PastCall.of(block.id, block.name, block.input) for block in blocks if isinstance(block, ToolUseBlock)]
    text = text_of([block for block in blocks if isinstance(block, TextBlock)])
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    content = text or (None if calls else "")
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": thoughts or None,
        "tool_calls": calls or None,
    }


def _with_results(message: InputMessage, blocks: list[ContentBlock]) -> Iterator[dict[str, Any]]:
    """The results of calls, each a message of its own, and what the user says before, between and after them."""
    text: list[TextBlock] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            text.append(block)
        elif isinstance(block, ToolResultBlock):
            if text:
                yield {"role": message.role, "content": text_of(text)}
                text = []
            result = ("Error: " if block.is_error else "") + text_of(block.content or "")
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": result}
    if text or not blocks:
        yield {"role": message.role, "content": text_of(text)}


def _tool(tool: CustomTool) -> Tool:
    function = Function(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict or None
    )
    return Tool(type="function", function=function)


def _choice(choice: Choice | None) -> ToolChoice | None:
    if choice is None:
        return None
    if choice.type == "tool":
        return NamedChoice(type="function", function=FunctionName(name=choice.name or ""))
    return "required" if choice.type == "any" else choice.type


def _format(config: OutputConfig) -> JsonSchemaFormat | None:
    if config.format is None:
        return None
    spec = JsonSchemaSpec(name="output", schema=config.format.schema_)
    return JsonSchemaFormat(type="json_schema", json_schema=spec)


def _thinking(thinking: Thinking | None) -> dict[str, Any] | None:
    if thinking is None or thinking.type not in ("enabled", "disabled"):
        return None
    return {"enable_thinking": thinking.type == "enabled"}


def _user(body: CountTokensRequest) -> str | None:
    """Whom the client says it asks for."""
    user = (body.metadata or {}).get("user_id")
    return user if isinstance(user, str) else None
