"""What /v1/responses answers: the response, its items, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ThoughtText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """What the model thought."""

    text: str


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """Text for the user."""

    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call for the client to make. Its result goes into an item function_call_output with the same ``call_id``."""

    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class OutputReasoning(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before it answered."""

    id: str
    status: Status
    summary: list[Any] = []
    content: list[ThoughtText]


OutputItem = OutputMessage | FunctionCall | OutputReasoning


class InputDetails(msgspec.Struct, frozen=True):
    """``cached_tokens``: whose keys and values came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """``reasoning_tokens``: of the thoughts' text."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class FailureDetail(msgspec.Struct, frozen=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """An answer. ``store``: whether it was kept, so that a request can go on from it.

    What may be long of the request is encoded once, for all events that have it.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    error: FailureDetail | None = None
    incomplete_details: IncompleteDetails | None = None
    store: bool
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    tools: msgspec.Raw
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: msgspec.Raw
    reasoning: dict[str, Any]
    metadata: msgspec.Raw
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    background: bool = False
    max_tool_calls: None = None
    service_tier: str = "default"
    top_logprobs: int = 0
    truncation: str = "disabled"
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a stream; which fields it has depends on its ``type``."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    item_id: str | None = None
    content_index: int | None = None
    item: OutputItem | None = None
    part: OutputText | ThoughtText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None


class StoredResponse(msgspec.Struct, frozen=True):
    """What is kept of a response: the conversation that it ended, and the response itself."""

    items: msgspec.Raw
    response: msgspec.Raw


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What was kept of a response is gone."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
