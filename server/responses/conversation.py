"""From a request of /v1/responses, and what was kept of earlier ones, to a request of chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from evospec.server.chat_generation import chat_request
from evospec.server.errors import ApiError, bad_request
from evospec.server.responses.objects import FunctionCall, ResponseObject, StoredResponse
from evospec.server.responses.request import (
    CallItem,
    CallOutputItem,
    FunctionChoice,
    FunctionTool,
    Item,
    Items,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    SchemaFormat,
    TextConfig,
)
from evospec.server.responses.store import NoSuchResponse
from evospec.server.schemas.chat import ChatCompletionRequest, text_of
from evospec.server.schemas.constraints import JsonObjectFormat, JsonSchemaFormat, JsonSchemaSpec
from evospec.server.schemas.tools import FunctionName, NamedChoice, PastCall, Tool, ToolChoice

_STORED = msgspec.json.Decoder(StoredResponse)
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(Items)
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
}
"""How fields of chat are called in this API."""


def all_items(body: ResponsesRequest, previous: bytes) -> list[Item]:
    """The conversation: what was kept of it (empty for nothing), then the request's input.

    Raises ``NoSuchResponse`` if what was kept cannot be read.
    """
    try:
        earlier = _ITEMS.validate_python(msgspec.json.decode(_STORED.decode(previous).items)) if previous else []
    except (msgspec.DecodeError, ValidationError):
        raise NoSuchResponse(body.previous_response_id or "") from None
    new = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    return earlier + new


def encode_stored(items: Sequence[Item], response: ResponseObject) -> bytes:
    """What is kept: the response, and the conversation with its answer, but without a call that was cut off."""
    whole = [item for item in response.output if not (isinstance(item, FunctionCall) and item.status != "completed")]
    conversation = [*(item.model_dump(exclude_none=True) for item in items), *whole]
    return msgspec.json.encode({"items": conversation, "response": response})


def stored_response(stored: bytes, response_id: str) -> bytes:
    """The response in what is kept, as JSON; raises ``NoSuchResponse`` if that cannot be read."""
    try:
        return bytes(_STORED.decode(stored).response)
    except msgspec.DecodeError:
        raise NoSuchResponse(response_id) from None


def to_chat(body: ResponsesRequest, items: Sequence[Item]) -> ChatCompletionRequest:
    """The same request for chat; raises ``ApiError`` 400 if there is none."""
    return chat_request(
        body,
        messages=_messages(body.instructions, items),
        max_completion_tokens=body.max_output_tokens,
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text or TextConfig()),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )


@contextmanager
def fields_of_responses() -> Iterator[None]:
    """Errors name the fields as this API does. A response that is not there to go on from is a wrong field, too."""
    try:
        yield
    except NoSuchResponse as error:
        raise bad_request(error.message, "previous_response_id", "previous_response_not_found") from None
    except ApiError as error:
        if error.param is not None:
            first, *rest = error.param.replace(".function.", ".").split(".")
            named = ".".join([_NAMES.get(first, first), *rest])
            if error.message.startswith(f"{error.param}: "):
                error.message = named + error.message.removeprefix(error.param)
            error.param = named
        raise


def _messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """What a model said in a row, thoughts, text and calls, is one message, as in the answers of chat."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                _assistant(messages, "content", "tool_calls")["content"] = text_of(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": text_of(item.content)})
            case CallItem():
                call = PastCall.of(item.call_id, item.name, item.arguments)
                _assistant(messages).setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
            case ReasoningItem() if item.content:
                message = _assistant(messages, "reasoning_content", "content", "tool_calls")
                message["reasoning_content"] = "".join(part.text for part in item.content)
    return [{"content": None if "tool_calls" in message else "", **message} for message in messages]


def _assistant(messages: list[dict[str, Any]], *without: str) -> dict[str, Any]:
    """The assistant's message at the end, if it has nothing of ``without`` yet, else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or messages[-1].keys() & set(without):
        messages.append({"role": "assistant"})
    return messages[-1]


def _tool(tool: FunctionTool) -> Tool:
    return Tool.model_validate({"type": "function", "function": tool.model_dump(exclude={"type"})})


def _choice(choice: str | FunctionChoice | None) -> ToolChoice | None:
    if isinstance(choice, FunctionChoice):
        return NamedChoice(type="function", function=FunctionName(name=choice.name))
    return choice  # type: ignore[return-value]  # validated


def _format(text: TextConfig) -> JsonObjectFormat | JsonSchemaFormat | None:
    match text.format:
        case SchemaFormat() as schema:
            spec = JsonSchemaSpec.model_validate(schema.model_dump(exclude={"type"}, by_alias=True))
            return JsonSchemaFormat(type="json_schema", json_schema=spec)
        case JsonObjectFormat() as json_object:
            return json_object
    return None
