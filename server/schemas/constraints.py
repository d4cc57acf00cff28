"""What an output has to be: OpenAI's ``response_format``, and vLLM's ``structured_outputs`` and ``guided_…``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from evospec.engine.messages import Grammar
from evospec.engine.sampling.json_schema import MAX_SCHEMA_CHARS, GrammarError, check_json_schema
from evospec.server.errors import bad_request
from evospec.server.schemas.body import Body, Harmless, LenientBody, NoOp

VLLM_CONSTRAINTS = {"structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"}
_MAX_CHOICES = 1024


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

JsonSchema = Annotated[dict[str, Any] | str, Field(description="The output is JSON that satisfies this schema.")]
Regex = Annotated[
    str, Field(min_length=1, max_length=MAX_SCHEMA_CHARS, description="The whole output matches this expression.")
]
Choice = Annotated[
    list[str],
    Field(min_length=1, max_length=_MAX_CHOICES, fail_fast=True, description="The output is one of these strings."),
]
Ebnf = Annotated[
    str, Field(min_length=1, max_length=MAX_SCHEMA_CHARS, description="The output is what the rule root describes.")
]


class StructuredOutputs(Body):
    """One of the first five says what the output has to be."""

    json_: JsonSchema | None = Field(default=None, alias="json")
    json_object: bool | None = Field(default=None, description="The output is any JSON object.")
    regex: Regex | None = None
    choice: Choice | None = None
    grammar: Ebnf | None = None
    structural_tag: Annotated[Any, NoOp()] = None
    whitespace_pattern: Annotated[Any, NoOp()] = None
    disable_any_whitespace: Annotated[Any, NoOp(False)] = None
    disable_additional_properties: Annotated[Any, NoOp(False)] = None
    disable_fallback: Annotated[Any, Harmless(False)] = None


class ConstraintFields(LenientBody):
    """The fields that constrain the output; a request has one of them at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choice | None = None
    guided_grammar: Ebnf | None = None


def to_grammar(body: ConstraintFields) -> Grammar | None:
    """The engine's form of what constrains the output; 400 for two constraints, or what the engine would refuse.

    It goes to the engine with every choice, so its size must be bounded here.
    """
    outputs = body.structured_outputs or StructuredOutputs()
    found = [
        _of_response_format(body.response_format),
        _of_schema(outputs.json_, "structured_outputs"),
        Grammar("json_object") if outputs.json_object else None,
        _of_text("regex", outputs.regex),
        _of_choice(outputs.choice, "structured_outputs"),
        _of_text("ebnf", outputs.grammar),
        _of_schema(body.guided_json, "guided_json"),
        _of_text("regex", body.guided_regex),
        _of_choice(body.guided_choice, "guided_choice"),
        _of_text("ebnf", body.guided_grammar),
    ]
    grammars = [grammar for grammar in found if grammar is not None]
    if len(grammars) > 1:
        raise bad_request("An output can have one constraint, and this request has several.", "structured_outputs")
    return grammars[0] if grammars else None


def _of_response_format(response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Grammar | None:
    if isinstance(response_format, JsonSchemaFormat):
        return _of_schema(response_format.json_schema.schema_, "response_format")
    return Grammar("json_object") if isinstance(response_format, JsonObjectFormat) else None


def _of_schema(schema: dict[str, Any] | str | None, field: str) -> Grammar | None:
    """The grammar of a JSON Schema, given as an object or as its text."""
    if schema is None:
        return None
    try:
        text = schema if isinstance(schema, str) else _written_out(schema)
        check_json_schema(text)
    except RecursionError as error:
        raise bad_request("The schema is nested too deeply.", field) from error
    except GrammarError as error:
        raise bad_request(str(error), field) from error
    return Grammar("json_schema", text)


def _of_text(kind: Literal["regex", "ebnf"], text: str | None) -> Grammar | None:
    return None if text is None else Grammar(kind, text)


def _of_choice(choice: list[str] | None, field: str) -> Grammar | None:
    """The grammar of one of several strings; it writes strings as JSON does."""
    if choice is None:
        return None
    text = "root ::= " + " | ".join(json.dumps(each, ensure_ascii=False) for each in dict.fromkeys(choice))
    if len(text) > MAX_SCHEMA_CHARS:
        raise bad_request(f"The choices are longer than {MAX_SCHEMA_CHARS} characters.", field)
    return Grammar("ebnf", text)


def _written_out(schema: dict[str, Any]) -> str:
    """The text of ``schema``; raises ``GrammarError`` for one that is too long, a hundred times sooner."""
    if len(msgspec.json.encode(schema)) > MAX_SCHEMA_CHARS:  # never longer than what json.dumps makes
        raise GrammarError(f"the JSON schema is longer than {MAX_SCHEMA_CHARS} characters")
    return json.dumps(schema)
