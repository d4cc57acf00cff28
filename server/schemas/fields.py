"""Field types and the parameters that both completion endpoints share."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from engine.config import MAX_SPECULATIVE_TOKENS
from engine.messages import Grammar
from engine.sampling.json_schema import MAX_SCHEMA_CHARS, GrammarError, check_json_schema
from server.errors import bad_request
from server.schemas.body import Body, Harmless, LenientBody, at_most
from server.schemas.unsupported import SYNONYMS, UNSUPPORTED
from server.session_ids import MAX_NAME_CHARS

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_METADATA = 16
MAX_CHOICES = 16
INT64 = 2**63


class StreamOptions(LenientBody):
    """``include_usage``: one more chunk, with usage and no choices, at the end."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="Usage so far in every chunk.")
    include_obfuscation: Annotated[Any, Harmless(False)] = None


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


class SamplingFields(LenientBody):
    """Parameters of generation. null means the default everywhere; those of sampling are in /v1/models.

    ``user``, ``metadata``, ``safety_identifier`` and ``prompt_cache_key`` label a request and never change its output.
    Nor does a session.
    """

    unsupported, synonyms = UNSUPPORTED, SYNONYMS

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="0: the most likely token only.")
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Choice i of a prompt uses seed + i.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    logit_bias: Annotated[dict[str, Bias] | None, at_most(MAX_LOGIT_BIAS)] = Field(
        default=None, max_length=MAX_LOGIT_BIAS, description="Token id (as a string) to bias."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128, fail_fast=True)
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
        max_length=MAX_NAME_CHARS,
        description="From POST /v1/sessions, or any name; may also be sent as the header X-Session-Id. Speed only: the "
        "output is the same.",
    )
    user: str | None = Field(
        default=None, max_length=MAX_NAME_CHARS, description="Names a session where nothing else does."
    )
    metadata: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = Field(default=None, max_length=MAX_METADATA)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = Field(default=None, description="Prefixes are shared within a tenant without it.")


def to_grammar(response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Grammar | None:
    """The engine's form of ``response_format``; 400 for a schema that the engine would refuse.

    It goes to the engine with every choice, so its size must be bounded here.
    """
    if isinstance(response_format, JsonSchemaFormat):
        try:
            schema = _written_out(response_format.json_schema.schema_)
            check_json_schema(schema)
        except RecursionError as error:
            raise bad_request("The schema is nested too deeply.", "response_format") from error
        except GrammarError as error:
            raise bad_request(str(error), "response_format") from error
        return Grammar("json_schema", schema)
    return Grammar("json_object") if isinstance(response_format, JsonObjectFormat) else None


def _written_out(schema: dict[str, Any]) -> str:
    """The text of ``schema``; raises ``GrammarError`` for one that is too long, a hundred times sooner."""
    if len(msgspec.json.encode(schema)) > MAX_SCHEMA_CHARS:  # never longer than what json.dumps makes
        raise GrammarError(f"the JSON schema is longer than {MAX_SCHEMA_CHARS} characters")
    return json.dumps(schema)
