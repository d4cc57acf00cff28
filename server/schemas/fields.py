"""Field types and the parameters that both completion endpoints share."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from engine.config import MAX_SPECULATIVE_TOKENS
from engine.messages import Grammar

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 16
INT64 = 2**63


class NoOp:
    """A field of the OpenAI API that is not supported: only the values that ask for nothing pass.

    ``tools: Annotated[Any, NoOp([])] = None`` accepts null and the empty list, and answers
    everything else with an error that names the field.
    """

    def __init__(self, *values: Any) -> None:
        self.values = [None, *values]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": self.values, "description": "Not supported; accepted only with a value that changes nothing."}

    def _check(self, value: Any) -> Any:
        if any(value == known and type(value) is type(known) for known in self.values):
            return value
        allowed = ", ".join(json.dumps(known) for known in self.values)
        raise PydanticCustomError(
            "unsupported_parameter", "not supported by this server (accepted: {allowed})", {"allowed": allowed}
        )


class Body(BaseModel):
    """A request body: unknown fields are errors, and types are not coerced ("1" is not 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """``include_usage``: one more chunk, with usage and no choices, at the end."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="Usage so far in every chunk.")
    include_obfuscation: Annotated[Any, NoOp(False)] = None


class TextFormat(Body):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaSpec(Body):
    """A JSON Schema the output must satisfy. It is always enforced, whatever ``strict`` says."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaSpec


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]

StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(Body):
    """Parameters of generation. null means the default everywhere.

    ``user``, ``metadata`` and ``safety_identifier`` label a request and never change its output. Nor does a session.
    """

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Choice i of a prompt uses seed + i.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    logit_bias: dict[str, Bias] | None = Field(
        default=None, max_length=MAX_LOGIT_BIAS, description="Token id (as a string) to bias."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat | None = None
    num_speculative_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SPECULATIVE_TOKENS,
        description="Most draft tokens a step, within the server's own limit; 0: no speculation. Speed only: the "
        "output is the same.",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="From POST /v1/sessions; may also be sent as the header X-Session-Id. Speed only: the output is "
        "the same.",
    )
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """One string or a list as a tuple."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def to_grammar(response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Grammar | None:
    """The engine's form of ``response_format``."""
    if isinstance(response_format, JsonSchemaFormat):
        return Grammar("json_schema", json.dumps(response_format.json_schema.schema_))
    return Grammar("json_object") if isinstance(response_format, JsonObjectFormat) else None
