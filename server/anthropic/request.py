"""The bodies of /v1/messages and /v1/messages/count_tokens, and the requests of chat that they amount to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from evospec.server.chat_generation import chat_request
from evospec.server.schemas.body import Harmless, LenientBody, NoOp, at_most
from evospec.server.schemas.chat import MAX_MESSAGES, ChatCompletionRequest, few_parts, text_of
from evospec.server.schemas.constraints import JsonSchemaFormat, JsonSchemaSpec
from evospec.server.schemas.fields import CommonFields, StopList
from evospec.server.schemas.tools import MAX_TOOLS, Function, FunctionName, NamedChoice, PastCall, Tool, ToolName
from evospec.server.schemas.tools import ToolChoice as ChatToolChoice
from evospec.server.schemas.unsupported import NEUTRAL, UNSUPPORTED

_SYNONYMS = {
    "stop": "stop_sequences",
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config",
    "reasoning_effort": "output_config",
}
_OF_CHAT = {name: NEUTRAL.get(name, []) for name in ChatCompletionRequest.model_fields if name not in _SYNONYMS}
"""What changes an answer there is not to be ignored here."""
_KEEPS_ALL = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}


class _Block(LenientBody):
    cache_control: Annotated[Any, Harmless()] = None


class TextBlock(_Block):
    """Text. Images and documents are not supported."""

    type: Literal["text"]
    text: str
    citations: Annotated[Any, Harmless([])] = None


class ThinkingBlock(_Block):
    """What a model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: Any = None


class RedactedThinkingBlock(_Block):
    """Thoughts that only another server could read."""

    type: Literal["redacted_thinking"]
    data: Annotated[Any, Harmless()] = None


class ToolUseBlock(_Block):
    """A call of a tool that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


class ToolResultBlock(_Block):
    """The result of a call. The model is told of an error by "Error: " before the text."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    is_error: bool | None = None


ContentBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
_OF_ASSISTANT = ThinkingBlock | RedactedThinkingBlock | ToolUseBlock


class InputMessage(LenientBody):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for block in () if isinstance(self.content, str) else self.content:
            if isinstance(block, _OF_ASSISTANT) and self.role != "assistant":
                raise PydanticCustomError("block", "{kind} is the assistant's only", {"kind": block.type})
            if isinstance(block, ToolResultBlock) and self.role != "user":
                raise PydanticCustomError("block", "tool_result is the user's only")
        return self


class CustomTool(LenientBody):
    """A tool that the client runs. Those that a server would have to run are not supported."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Annotated[Any, Harmless()] = None


class ToolChoice(LenientBody):
    """Whether the answer calls tools. ``name`` belongs to "tool" and says which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise PydanticCustomError("missing", "Field required", {"param": "name"})
        return self


class Thinking(LenientBody):
    """For the model's chat template, if it knows ``enable_thinking``. ``max_tokens`` is the only budget."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[Any, Harmless()] = None
    display: Annotated[Any, Harmless()] = None


class SchemaFormat(LenientBody):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(LenientBody):
    """``effort``: for the model's chat template, if it knows it."""

    effort: str | None = None
    format: SchemaFormat | None = None


class CountTokensRequest(CommonFields):
    """Count the tokens of a conversation."""

    synonyms: ClassVar = _SYNONYMS
    unsupported: ClassVar = UNSUPPORTED | _OF_CHAT | {"prefill": []}

    messages: Annotated[list[InputMessage], BeforeValidator(few_parts)] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[CustomTool] | None, at_most(MAX_TOOLS)] = Field(
        default=None, max_length=MAX_TOOLS, fail_fast=True, description="For the model to call."
    )
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: Annotated[Any, NoOp({"edits": []}, _KEEPS_ALL)] = None
    container: Annotated[Any, NoOp()] = None
    mcp_servers: Annotated[Any, NoOp([])] = None
    cache_control: Annotated[Any, Harmless()] = None
    service_tier: Annotated[Any, Harmless("auto", "standard_only")] = None
    inference_geo: Annotated[Any, Harmless()] = None
    speed: Annotated[Any, Harmless("standard")] = None
    diagnostics: Annotated[Any, Harmless()] = None

    @model_validator(mode="after")
    def _check_last(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise PydanticCustomError(
                "prefill", "must not end with the assistant's: no answer goes on with it", {"param": "messages"}
            )
        return self


class MessagesRequest(CountTokensRequest):
    """Answer a conversation."""

    max_tokens: int = Field(ge=1, lt=2**31, description="As many as fit into the context, if it is more.")
    stop_sequences: StopList | None = None


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
    return {
        "role": "assistant",
        "content": text or (None if calls else ""),
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


def _choice(choice: ToolChoice | None) -> ChatToolChoice | None:
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
