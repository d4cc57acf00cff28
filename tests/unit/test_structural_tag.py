"""What answers to requests with tools may look like: by xgrammar, over a vocabulary of bytes."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
import xgrammar

from evospec.engine.messages import Grammar
from evospec.engine.sampling.grammar import GrammarCompiler
from evospec.server.errors import ApiError
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.schemas.constraints import to_grammar
from evospec.server.tools.chat_format import HERMES, LLAMA, CallFormat, ChatFormat
from evospec.server.tools.structural_tag import chat_grammar

END = 256
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PARIS = '{"city": "Paris"}'
LONG = "(" * 20 + "ab" + "){2,}" * 20
"""A pattern of millions of characters once its groups are written out."""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler([bytes([byte]) for byte in range(256)] + [b""], [END])


def tool(name: str = "weather", parameters: Any = CITY, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def grammar(
    *tools: Any, form: CallFormat = HERMES, thinks: bool = False, is_thinking: bool = False, **more: Any
) -> Grammar:
    """That of a request with these tools, or a plain one."""
    messages = [{"role": "user", "content": "Hi"}]
    body = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": messages, "tools": [*tools] or [tool()], **more}
    )
    found = chat_grammar(body, to_grammar(body), ChatFormat(form, thinks), is_thinking)
    assert found is not None
    return found


def call(arguments: str = PARIS, name: str = "weather", form: CallFormat = HERMES) -> str:
    return form.begin + name + form.middle + arguments + form.end


def allows(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Whether a text may be a whole answer."""
    matcher = xgrammar.GrammarMatcher(compiler.compile(grammar).compiled)
    return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(END)


@pytest.mark.parametrize(
    ("choice", "allowed", "refused"),
    [
        ("auto", ["", "No.\n\tNo.", call(), "Yes: " + call() + "\n" + call() + " Done"], ["<tool_call>", call("{}")]),
        (
            "required",
            [call(), call() + "\n" + call("{}", "now")],
            ["", "No.", "A" + call(), call() + "No.", call("{}")],
        ),
        ({"type": "function", "function": {"name": "now"}}, [call("{}", "now")], ["", call(), call("{}", "now") * 2]),
    ],
)
def test_what_a_choice_allows(compiler: GrammarCompiler, choice: Any, allowed: list[str], refused: list[str]) -> None:
    wanted = grammar(tool(), tool("now", {"type": "object", "properties": {}}), tool_choice=choice)
    assert [text for text in allowed if not allows(compiler, wanted, text)] == []
    assert [text for text in refused if allows(compiler, wanted, text)] == []


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_one_call_without_parallel_calls(compiler: GrammarCompiler, choice: str) -> None:
    one = grammar(tool_choice=choice, parallel_tool_calls=False)
    assert allows(compiler, one, call())
    assert not allows(compiler, one, call() + "\n" + call())


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_llama_makes_one_call(compiler: GrammarCompiler, choice: str) -> None:
    llama = grammar(tool_choice=choice, form=LLAMA)
    assert allows(compiler, llama, call(form=LLAMA))
    assert not allows(compiler, llama, call(form=LLAMA) + call(form=LLAMA))
    assert allows(compiler, llama, "Hello") == (choice == "auto")


@pytest.mark.parametrize(
    ("parameters", "strict", "allowed", "refused"),
    [
        (
            CITY,
            None,
            [PARIS, '{"city":"Paris"}'],
            ["{}", '{"city": 5}', '{"city": "a", "b": 1}', '{  "city": "Paris"}'],
        ),
        (CITY, True, [PARIS], ["{}"]),
        (CITY, False, [PARIS, "{}", '{"a": [{"b": null}]}'], ["5", "[]", "{"]),
        (None, None, ["{}"], ['{"a": 1}']),
        ({"type": "object", "properties": {}}, None, ["{}"], ['{"a": 1}', "5"]),
        ({"properties": {"a": {"type": "integer"}}}, None, ["{}", '{"a": 1}'], ["5", '{"a": "b"}']),
        ({"type": "object", "not": {}}, None, ["{}", '{"a": 1}'], ["5"]),
        (
            {"type": "object", "properties": {"description": {"type": "string", "description": "its own"}}},
            True,
            ['{"description": "x"}'],
            ['{"description": 1}'],
        ),
        (
            {"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}}},
            True,
            ['{"a": "xy"}'],
            ['{"a": "xyz"}', '{"a": "\n"}'],
        ),
    ],
)
def test_what_arguments_may_be(
    compiler: GrammarCompiler, parameters: Any, strict: bool | None, allowed: list[str], refused: list[str]
) -> None:
    wanted = grammar(tool(parameters=parameters, strict=strict), tool_choice="required")
    assert [text for text in allowed if not allows(compiler, wanted, call(text))] == []
    assert [text for text in refused if allows(compiler, wanted, call(text))] == []


def test_no_control_characters_in_strings_with_a_length(compiler: GrammarCompiler) -> None:
    """xgrammar itself would let them in; without such strings there may be any in the text beside calls."""
    with_length = grammar(tool(parameters={"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}}}))
    compiled = compiler.compile(with_length)
    assert b"\t"[0] in compiled.excluded_token_ids
    assert b"\n"[0] not in compiled.excluded_token_ids
    assert compiler.compile(grammar()).excluded_token_ids == {END} - {END}


def test_a_response_format_is_for_answers_without_calls(compiler: GrammarCompiler) -> None:
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
    wanted = grammar(response_format=schema)
    assert allows(compiler, wanted, '{"n": 1}')
    assert allows(compiler, wanted, call())
    assert not allows(compiler, wanted, "Hello")
    assert not allows(compiler, wanted, '{"n": "a"}')
    assert not allows(compiler, grammar(response_format=schema, tool_choice="required"), '{"n": 1}')
    assert allows(compiler, grammar(response_format={"type": "json_object"}), '{"a": {}}')


@pytest.mark.parametrize(
    ("is_thinking", "allowed", "refused"),
    [
        (False, [call(), "<think>\nHm\n</think>\n\n" + call()], ["<think>Hm", "Hm</think>" + call()]),
        (True, ["\nHm\n</think>\n\n" + call()], [call(), "Hm"]),
    ],
)
def test_thoughts_come_first(
    compiler: GrammarCompiler, is_thinking: bool, allowed: list[str], refused: list[str]
) -> None:
    wanted = grammar(tool_choice="required", thinks=True, is_thinking=is_thinking)
    assert [text for text in allowed if not allows(compiler, wanted, text)] == []
    assert [text for text in refused if allows(compiler, wanted, text)] == []


@pytest.mark.parametrize(
    ("constraint", "answer"),
    [
        ({"response_format": {"type": "json_object"}}, "{}"),
        ({"guided_json": {"type": "object", "properties": {}}}, "{}"),
        ({"guided_regex": "(ab)+"}, "abab"),
        ({"guided_choice": ["yes", "no"]}, "no"),
        ({"guided_grammar": 'root ::= "x" | "y"'}, "y"),
    ],
)
def test_constraints_are_for_what_comes_after_thoughts(
    compiler: GrammarCompiler, constraint: dict[str, Any], answer: str
) -> None:
    begun = grammar(tool_choice="none", thinks=True, is_thinking=True, **constraint)
    assert allows(compiler, begun, f"Hm </think>\n\n{answer}")
    assert not allows(compiler, begun, answer)
    assert not allows(compiler, begun, "Hm </think>\n\n!")
    assert grammar(tool_choice="none", thinks=True, **constraint).kind != "structural_tag"


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([tool(parameters={"type": "object", "not": {}}, strict=True)], "tools.0.function.parameters"),
        ([tool(parameters={"enum": ["x" * 70_000]}, strict=True)], "tools.0.function.parameters"),
        ([tool(parameters={"type": "object", "description": "x" * 300_000})], "tools"),
        (
            [tool(f"tool_{n}", {"type": "object", "properties": {"a": {"enum": ["x" * 1000]}}}) for n in range(90)],
            "tools",
        ),
    ],
)
def test_tools_that_are_refused(tools: list[Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        grammar(*tools)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_long_name_in_the_parameters_takes_little_memory() -> None:
    """The paths of all schemas below it would take a gigabyte."""
    parameters = {"type": "object", "properties": {"a" * 50_000: {"anyOf": [0] * 25_000}}}
    tracemalloc.start()
    with pytest.raises(ApiError):
        grammar(tool(parameters=parameters, strict=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("constraint", [{"guided_regex": LONG}, {"guided_json": {"type": "string", "pattern": LONG}}])
def test_patterns_that_grow_too_long_are_refused(constraint: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        grammar(tool_choice="none", thinks=True, is_thinking=True, **constraint)
    assert refused.value.status == 400


def test_descriptions_take_no_room() -> None:
    described = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 100_000}}}
    bare = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert grammar(tool(parameters=described)) == grammar(tool(parameters=bare))
    assert json.loads(grammar().schema or "")["type"] == "structural_tag"
