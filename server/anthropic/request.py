"""The bodies of /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.schemas.body import Harmless, LenientBody, NoOp, at_most
from server.schemas.chat import MAX_MESSAGES, ChatCompletionRequest, few_parts
from server.schemas.fields import CommonFields, StopList
from server.schemas.tools import MAX_TOOLS, ToolName
from server.schemas.unsupported import NEUTRAL, UNSUPPORTED

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
