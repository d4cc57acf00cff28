"""Constraints on the output, by all the names that they have."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from evospec.engine.messages import Grammar
from evospec.server.errors import ApiError
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.schemas.completions import CompletionRequest
from evospec.server.schemas.constraints import to_grammar
from tests.unit.test_schemas import CHAT, TEXT, error_of

SCHEMA = {"type": "integer"}
CHOICE = ["yes", 'no "\n', "é 😀", "yes"]
CHOICE_EBNF = 'root ::= "yes" | "no \\"\\n" | "é 😀"'


def grammar_of(**fields: Any) -> Grammar | None:
    return to_grammar(CompletionRequest.model_validate({**TEXT, **fields}))


@pytest.mark.parametrize(
    ("vllm", "guided", "expected"),
    [
        ({"json": SCHEMA}, {"guided_json": SCHEMA}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"json": json.dumps(SCHEMA)}, {"guided_json": json.dumps(SCHEMA)}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"json_object": True}, {"response_format": {"type": "json_object"}}, Grammar("json_object")),
        ({"regex": "a+"}, {"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"grammar": "root ::= x"}, {"guided_grammar": "root ::= x"}, Grammar("ebnf", "root ::= x")),
        ({"choice": CHOICE}, {"guided_choice": CHOICE}, Grammar("ebnf", CHOICE_EBNF)),
        ({"json_object": False, "disable_any_whitespace": False}, {"guided_json": None}, None),
    ],
)
def test_both_ways_of_vllm_mean_the_same(vllm: Any, guided: Any, expected: Grammar | None) -> None:
    assert grammar_of(structured_outputs=vllm) == expected
    assert grammar_of(**guided) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": ["a" * 40_000, "b" * 40_000]}, "guided_choice"),
    ],
)
def test_what_cannot_be_enforced_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        grammar_of(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 65_537}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"guided_grammar": 5}, "guided_grammar"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"grammar": "root ::= x"}, "grammar"),
    ],
)
def test_bodies_that_are_wrong_name_the_place(fields: dict[str, Any], param: str) -> None:
    assert error_of(CompletionRequest, {**TEXT, **fields}).param == param


def test_a_long_name_above_many_schemas_takes_little_memory() -> None:
    """Their paths together would take 500 MB."""
    schemas = [*([True] * 5_000), 0]
    schema = json.dumps({"type": "object", "properties": {"a" * 30_000: {"anyOf": schemas}}})
    tracemalloc.start()
    with pytest.raises(ApiError) as caught:
        grammar_of(guided_json=schema)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.message.startswith("the JSON schema at #/properties/aaa")
    assert caught.value.message.endswith("… must be an object or a boolean")
    assert peak < 5e6


def test_the_place_of_what_is_wrong_in_a_schema_is_told() -> None:
    schema = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"items": {"not": {}}}]}}}
    with pytest.raises(ApiError) as caught:
        grammar_of(guided_json=schema)
    assert caught.value.message == "the JSON schema at #/properties/a/anyOf/1/items is not supported: not"


def test_tools_have_a_grammar_of_their_own() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    error = error_of(ChatCompletionRequest, {**CHAT, "tools": tools, "guided_regex": "a"})
    assert (error.status, error.param) == (400, "guided_regex")
    ChatCompletionRequest.model_validate({**CHAT, "tools": tools, "tool_choice": "none", "guided_regex": "a"})
