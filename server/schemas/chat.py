"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from evospec.engine.messages import TokenSource
from evospec.server.schemas.answers import AnswerBody, Usage
from evospec.server.schemas.body import Body, Harmless, LenientBody, NoOp, at_most
from evospec.server.schemas.constraints import VLLM_CONSTRAINTS
from evospec.server.schemas.fields import SamplingFields
from evospec.server.schemas.tools import MAX_TOOLS, NamedChoice, PastCalls, Tool, ToolCall, ToolCallDelta, ToolChoice

MAX_MESSAGES = 2048
MAX_PARTS = 2048
"""Of all messages together."""
MAX_TEMPLATE_VARIABLES = 32
_SET_BY_SERVER = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}


class TextPart(LenientBody):
    """A piece of a message. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class HasText(Protocol):
    """A part of any API's message that is text."""

    text: str


def text_of(content: str | Sequence[HasText]) -> str:
    """Parts are joined without a separator."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Prediction(Body):
    """What the answer is likely to be, in whole or in parts: it comes sooner where it is right, and is the same."""

    type: Literal["content"]
    content: Annotated[Content, at_most(MAX_PARTS)]


class Message(LenientBody):
    """One message of the conversation. ``developer`` is the newer name of ``system``.

    ``parsed`` is the openai client's own copy of ``content``, which it sends back
    with the answers that it has parsed; ``content`` is what counts. What ``name`` and ``reasoning_content`` are good
    for is up to the model's chat template. ``prefix`` and ``partial`` would have the answer go on with the message.
    """

    unsupported: ClassVar = {"prefix": [False], "partial": [False]}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(default=None, description="May be null beside tool_calls only.")
    name: str | None = None
    reasoning_content: str | None = None
    parsed: Any = None
    refusal: Annotated[Any, NoOp()] = None
    audio: Annotated[Any, NoOp()] = None
    annotations: Annotated[Any, Harmless([])] = None
    function_call: Annotated[Any, NoOp()] = None
    tool_calls: PastCalls | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "are the assistant's only", {"param": "tool_calls"})
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("missing", "Field required", {"param": "content"})
        return self

    def for_template(self, as_objects: bool = False) -> dict[str, Any]:
        """What chat templates may want to know: the role, plain text, and what else there is, else None.

        ``as_objects``: as for ``PastCall``.
        """
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": text_of(self.content or ""),
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.for_template(as_objects) for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
        }


def few_parts(messages: Any) -> Any:
    """Refuses too many parts before any is looked at: they are checked where nobody else is served meanwhile."""
    objects = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    parts = list(_parts_of(objects, "content", "output", "tool_calls"))
    if len(parts) + sum(1 for _ in _parts_of(parts, "content")) > MAX_PARTS:  # a tool's result is a part with parts
        raise PydanticCustomError("too_long", "must have at most {limit} parts in all", {"limit": MAX_PARTS})
    return messages


def _parts_of(objects: Sequence[Any], *names: str) -> Iterator[Any]:
    """The members of lists in some fields."""
    found = (one.get(name) for one in objects if isinstance(one, dict) for name in names)
    return chain.from_iterable(each for each in found if isinstance(each, list))


def _free_names(value: Any) -> Any:
    """Refuses variables that the server sets."""
    if isinstance(value, dict) and (taken := _SET_BY_SERVER & value.keys()):
        raise PydanticCustomError("template_variable", "{name} is set by the server", {"name": min(taken)})
    return value


TemplateVariables = Annotated[
    dict[str, Any],
    BeforeValidator(_free_names),
    at_most(MAX_TEMPLATE_VARIABLES),
    Field(max_length=MAX_TEMPLATE_VARIABLES, description="More variables for the model's chat template."),
]


class ChatCompletionRequest(SamplingFields):
    """Answer a conversation."""

    messages: Annotated[list[Message], BeforeValidator(few_parts)] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        lt=2**31,
        description="Default: all that fits, at most a quarter of the tenant's tokens a minute.",
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Needs logprobs.")
    tools: Annotated[list[Tool] | None, at_most(MAX_TOOLS)] = Field(
        default=None, max_length=MAX_TOOLS, fail_fast=True, description="Functions for the model to call."
    )
    tool_choice: ToolChoice | None = Field(
        default=None, description="Default auto, and none without tools. With none, the model does not see the tools."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Whether one answer may have several calls.")
    functions: Annotated[Any, NoOp([])] = None
    function_call: Annotated[Any, NoOp("none", "auto")] = None
    modalities: Annotated[Any, NoOp(["text"])] = None
    audio: Annotated[Any, NoOp()] = None
    prediction: Prediction | None = None
    reasoning_effort: str | None = Field(default=None, description="For the model's chat template, if it knows it.")
    chat_template_kwargs: TemplateVariables | None = None
    verbosity: Annotated[Any, Harmless("medium")] = None
    web_search_options: Annotated[Any, NoOp()] = None
    service_tier: Annotated[Any, Harmless("auto", "default")] = None
    store: Annotated[Any, Harmless(False)] = None

    def template_variables(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "have a name twice", {"param": "tools"})
        if self.tool_choice == "required" and not names:
            raise PydanticCustomError("tool_choice", "needs tools", {"param": "tool_choice"})
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise PydanticCustomError("tool_choice", "names none of the tools", {"param": "tool_choice"})
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        used = {name for name in VLLM_CONSTRAINTS if getattr(self, name) is not None}
        if self.usable_tools and used:
            raise PydanticCustomError("constraint", "cannot be used with tools", {"param": min(used)})
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "needs logprobs to be true", {"param": "top_logprobs"})
        return self


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative. ``bytes`` are the token's own UTF-8 bytes, perhaps only part of a character; None for one without
    text, such as the token that ends an answer."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob, frozen=True):
    """A chosen token, its most likely alternatives, and who proposed it: EvoSpec's addition to the OpenAI API."""

    top_logprobs: list[TopLogprob]
    source: TokenSource


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry a token."""

    content: list[ContentLogprob]


FinishReason = Literal["stop", "length", "tool_calls"]


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. ``content`` is null beside calls without any. ``reasoning_content``: what a model thought first."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class ChatCompletion(AnswerBody, frozen=True, kw_only=True):
    """Response of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an event adds: the role (first event of a choice only), text, and parts of calls."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunk(AnswerBody, frozen=True, kw_only=True):
    """One event of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
