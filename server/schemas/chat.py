"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.messages import TokenSource
from server.schemas.answers import AnswerBody, Usage
from server.schemas.fields import Body, NoOp, SamplingFields

MAX_MESSAGES = 2048
MAX_PARTS = 2048
"""Of all messages together."""


class TextPart(Body):
    """A piece of a message. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


def text_of(content: str | list[TextPart]) -> str:
    """Parts are joined without a separator."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Prediction(Body):
    """What the answer is likely to be, in whole or in parts: it comes sooner where it is right, and is the same."""

    type: Literal["content"]
    content: Content


class Message(Body):
    """One message of the conversation. ``developer`` is the newer name of ``system``.

    ``parsed`` is the openai client's own copy of ``content``, which it sends back
    with the answers that it has parsed; ``content`` is what counts.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[Any, NoOp()] = None
    parsed: Any = None
    refusal: Annotated[Any, NoOp()] = None
    audio: Annotated[Any, NoOp()] = None
    annotations: Annotated[Any, NoOp([])] = None
    function_call: Annotated[Any, NoOp()] = None
    tool_calls: Annotated[Any, NoOp([])] = None

    def for_template(self) -> dict[str, str]:
        """Role and plain text, as chat templates want them."""
        return {"role": "system" if self.role == "developer" else self.role, "content": text_of(self.content)}


def _few_parts(messages: Any) -> Any:
    """Refuses too many parts before any is looked at: they are checked where nobody else is served meanwhile."""
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    if sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
        raise PydanticCustomError("too_long", "must have at most {limit} parts in all", {"limit": MAX_PARTS})
    return messages


class ChatCompletionRequest(SamplingFields):
    """Answer a conversation."""

    messages: Annotated[list[Message], BeforeValidator(_few_parts)] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="Default: all that fits.")
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="Newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Needs logprobs.")
    tools: Annotated[Any, NoOp([])] = None
    tool_choice: Annotated[Any, NoOp("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, NoOp()] = None
    functions: Annotated[Any, NoOp([])] = None
    function_call: Annotated[Any, NoOp("none", "auto")] = None
    modalities: Annotated[Any, NoOp(["text"])] = None
    audio: Annotated[Any, NoOp()] = None
    prediction: Prediction | None = None
    reasoning_effort: Annotated[Any, NoOp("none")] = None
    verbosity: Annotated[Any, NoOp("medium")] = None
    web_search_options: Annotated[Any, NoOp()] = None
    service_tier: Annotated[Any, NoOp("auto", "default")] = None
    store: Annotated[Any, NoOp(False)] = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "needs logprobs to be true", {"param": "top_logprobs"})
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "max_tokens", "differs from max_completion_tokens; send one of them", {"param": "max_tokens"}
            )
        return self


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative. ``bytes`` are the token's own UTF-8 bytes, perhaps only part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob, frozen=True):
    """A chosen token, its most likely alternatives, and who proposed it: EvoSpec's addition to the OpenAI API."""

    top_logprobs: list[TopLogprob]
    source: TokenSource


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry a token."""

    content: list[ContentLogprob]


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None


class ChatCompletion(AnswerBody, frozen=True, kw_only=True):
    """Response of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an event adds: the role (first event of a choice only) and text."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class ChatChunk(AnswerBody, frozen=True, kw_only=True):
    """One event of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
