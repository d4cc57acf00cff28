"""Tools in requests, and calls of them in messages and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from evospec.server.schemas.body import LenientBody

MAX_TOOLS = 128
MAX_CALLS = 128
"""In one message of the conversation."""


ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")]


class Function(LenientBody):
    """What a model may call. ``parameters`` is a JSON Schema of an object; without it there are no arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        default=None,
        description="Whether arguments satisfy the schema: true: always; false: they are any object; by default they "
        "do wherever the schema can be enforced.",
    )


class Tool(LenientBody):
    """A function for the model to call."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What the chat template shows the model."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionName(LenientBody):
    """The function to call."""

    name: str


class NamedChoice(LenientBody):
    """One call, of this function."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def _object_of(text: Any) -> Any:
    """The arguments of a past call as the object that chat templates want; text that is none, as what was cut off."""
    if not isinstance(text, str):
        raise PydanticCustomError("arguments", "must be a JSON object, as text")
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


Arguments = Annotated[dict[str, Any] | str, BeforeValidator(_object_of), WithJsonSchema({"type": "string"})]
"""Of a past call: an object, sent as text, or the text itself where it is none."""


class PastFunction(LenientBody):
    """The function that was called, and with what."""

    name: str
    arguments: Arguments


class PastCall(LenientBody):
    """A call that the assistant made before."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: PastFunction

    @classmethod
    def of(cls, call_id: str, name: str, arguments: dict[str, Any] | str) -> Self:
        """The call with arguments as ``Arguments`` has them."""
        return cls(id=call_id, function=PastFunction.model_construct(name=name, arguments=arguments))

    def for_template(self, as_objects: bool = False) -> dict[str, Any]:
        """The call as chat templates know it; ``as_objects``: arguments that are text are the only one of an object."""
        call = self.model_dump(exclude_none=True)
        if as_objects and isinstance(self.function.arguments, str):
            call["function"]["arguments"] = {"arguments": self.function.arguments}
        return call


PastCalls = Annotated[list[PastCall], Field(max_length=MAX_CALLS, fail_fast=True)]


class CalledFunction(msgspec.Struct, frozen=True):
    """``arguments`` is JSON, as text; whole only where the answer was not cut off in it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the client is to make; its result goes into a message of role ``tool`` with this id."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionDelta(msgspec.Struct, frozen=True):
    """The name (first event of a call only), and more text of the arguments."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What an event adds to call ``index``; ``id`` and ``type`` come with its first event."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta
