"""The body of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, Tag, field_serializer
from pydantic_core import PydanticCustomError

from evospec.server.schemas.body import Harmless, LenientBody, NoOp, at_most
from evospec.server.schemas.chat import MAX_MESSAGES, ChatCompletionRequest, few_parts
from evospec.server.schemas.constraints import JsonObjectFormat, JsonSchemaSpec, TextFormat
from evospec.server.schemas.fields import CommonFields
from evospec.server.schemas.tools import MAX_TOOLS, Arguments, ToolName
from evospec.server.schemas.unsupported import NEUTRAL, UNSUPPORTED

_SYNONYMS = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
_OF_CHAT = {name: NEUTRAL.get(name, []) for name in ChatCompletionRequest.model_fields if name not in _SYNONYMS}
"""What changes an answer there is not to be ignored here."""

_Echo = Annotated[Any, Field(exclude=True, description="Sent back with an answer; without effect.")]


class InputText(LenientBody):
    """A piece of a message, or of a call's result. Images and files are not supported."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: _Echo = None
    logprobs: _Echo = None
    parsed: _Echo = None


class ReasoningText(LenientBody):
    """A piece of what a model thought."""

    type: Literal["reasoning_text"]
    text: str


Text = str | Annotated[list[InputText], Field(fail_fast=True)]


class _Item(LenientBody):
    id: _Echo = None
    status: _Echo = None


class MessageItem(_Item):
    """A message of the conversation, the client's or one that the server answered."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    phase: _Echo = None


class CallItem(_Item):
    """A call of a function that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    parsed_arguments: _Echo = None

    @field_serializer("arguments")
    def _as_text(self, arguments: dict[str, Any] | str) -> str:
        return arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()


class CallOutputItem(_Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


class ReasoningItem(_Item):
    """What a model thought; ``content`` is what counts."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText] | None, Field(fail_fast=True)] = None
    summary: _Echo = None
    encrypted_content: _Echo = None


def _type_of(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _type_of,
        custom_error_type="item",
        custom_error_message="this server knows items of type message, function_call, function_call_output and "
        "reasoning only",
    ),
]
Items = Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(few_parts)]


class FunctionTool(LenientBody):
    """A function for the model to call. Tools that a server would have to run are not supported."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description="As in chat.")


class FunctionChoice(LenientBody):
    """One call, of this function."""

    type: Literal["function"]
    name: str


class SchemaFormat(JsonSchemaSpec):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]


class TextConfig(LenientBody):
    """What the answer's text has to be."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[Any, Harmless("medium")] = None


class Reasoning(LenientBody):
    """``effort``: for the model's chat template, if it knows it. There are no summaries."""

    effort: str | None = None
    summary: Annotated[Any, Harmless()] = None
    generate_summary: Annotated[Any, Harmless()] = None


def _check_includes(value: Any) -> Any:
    """Refuses what would be missed; the rest belongs to tools that are not here, or is there anyway."""
    if isinstance(value, list) and "message.output_text.logprobs" in value:
        raise PydanticCustomError("include", "message.output_text.logprobs is not supported by this server")
    return value


class ResponsesRequest(CommonFields):
    """Answer a conversation, which may go on from an earlier answer."""

    synonyms: ClassVar = _SYNONYMS
    unsupported: ClassVar = UNSUPPORTED | _OF_CHAT | {"context_management": [[]], "moderation": []}

    input: Annotated[str | Items, Field(description="A user's message, or items.")]
    instructions: str | None = Field(
        default=None, description="A system message before all others, for this answer only."
    )
    previous_response_id: str | None = Field(
        default=None, max_length=128, description="Of an answer that was stored; its conversation goes on."
    )
    store: bool | None = Field(
        default=None, description="false: nothing of this is kept, and no request can go on from the answer."
    )
    max_output_tokens: int | None = Field(
        default=None,
        ge=1,
        lt=2**31,
        description="Default: all that fits, at most a quarter of the tenant's tokens a minute.",
    )
    tools: Annotated[list[FunctionTool] | None, at_most(MAX_TOOLS)] = Field(
        default=None, max_length=MAX_TOOLS, fail_fast=True, description="Functions for the model to call."
    )
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="Whether one answer may have several calls.")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str] | None, BeforeValidator(_check_includes)] = Field(
        default=None, max_length=16, description="Without effect."
    )
    truncation: Annotated[Any, NoOp("disabled")] = None
    background: Annotated[Any, NoOp(False)] = None
    conversation: Annotated[Any, NoOp()] = None
    top_logprobs: Annotated[Any, NoOp(0)] = None
    stream_options: Annotated[Any, Harmless()] = None
    max_tool_calls: Annotated[Any, Harmless()] = None
    service_tier: Annotated[Any, Harmless("auto", "default")] = None
    prompt_cache_retention: Annotated[Any, Harmless()] = None
