"""Answers taken apart: the same parts however the text was split, and the calls that ``transformers`` finds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from evospec.server.tools.answer_parser import AnswerParser, Part
from evospec.server.tools.chat_format import HERMES, LLAMA, CallFormat, ChatFormat

QWEN = next(template for families, template in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in families)
FORMS = {
    "hermes": ChatFormat(HERMES, thinks=False),
    "qwen3": ChatFormat(HERMES, thinks=True),
    "llama": ChatFormat(LLAMA, thinks=False),
}
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<", "tool_call>", *'"{}\\\n aé')
WORDS = st.lists(st.sampled_from(MARKS), max_size=9).map("".join)
VALUES = st.none() | st.integers() | WORDS | st.lists(WORDS, max_size=2) | st.dictionaries(WORDS, WORDS, max_size=2)
CALLS = st.tuples(st.from_regex("[a-z_]{1,9}", fullmatch=True), st.dictionaries(WORDS, VALUES, max_size=3))


def is_plain(text: str) -> bool:
    """Whether nobody takes a text for anything but content, or for content with other white space."""
    return text == text.strip() and not any(mark in text for mark in ("<tool_call>", "<think>", "</think>"))


def written(form: CallFormat, name: str, arguments: dict[str, Any]) -> str:
    return form.begin + name + form.middle + json.dumps(arguments, ensure_ascii=False) + form.end


@dataclass
class Answer:
    """The parts of an answer, joined; of each call its name and its arguments."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)


def joined(parts: Iterable[Part]) -> Answer:
    answer = Answer()
    for part in parts:
        match part.kind:
            case "text":
                answer.content += part.text
            case "thoughts":
                answer.reasoning += part.text
            case "call":
                name, arguments = (part.name, "") if part.name else answer.calls.pop()
                answer.calls.append((name, arguments + part.text))
    return answer


def parse(form: ChatFormat, text: str, cuts: list[int], is_thinking: bool = False) -> Answer:
    """The text's parts, where it comes in pieces that end at ``cuts``."""
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parser = AnswerParser(form, with_calls=True, is_thinking=is_thinking)
    pieces = [text[begin:end] for begin, end in pairwise(ends)]
    return joined(part for number, piece in enumerate(pieces, 1) for part in parser.push(piece, number == len(pieces)))


@given(
    thoughts=st.none() | WORDS.filter(is_plain),
    content=WORDS.filter(is_plain),
    calls=st.lists(CALLS, max_size=3),
    cuts=st.lists(st.integers(0, 10_000), max_size=40),
)
@example(thoughts=None, content="", calls=[("a", {"}\n</tool_call>": '", "arguments": '})], cuts=list(range(200)))
@example(thoughts="a", content="b", calls=[("a", {}), ("a", {"a": {}})], cuts=list(range(300)))
def test_no_split_breaks_a_call(
    thoughts: str | None, content: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    text = "" if thoughts is None else f"<think>\n{thoughts}\n</think>\n\n"
    text += "\n".join([*([content] if content else []), *(written(HERMES, *call) for call in calls)])
    answer = parse(FORMS["qwen3"], text, cuts)
    assert answer.reasoning == (thoughts or "")
    assert answer.content == content
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == calls
    if not any("</tool_call>" in json.dumps(arguments) for _, arguments in calls):  # that ends a call for them
        theirs = parse_response(text, QWEN, prefix="")
        functions = [call["function"] for call in theirs.get("tool_calls", [])]
        assert calls == [(function["name"], function["arguments"]) for function in functions]
        assert (answer.content, answer.reasoning) == (theirs.get("content", ""), theirs.get("reasoning_content", ""))


@given(content=WORDS.filter(is_plain), call=CALLS, cuts=st.lists(st.integers(0, 10_000), max_size=40))
def test_no_split_breaks_a_call_that_ends_with_its_arguments(
    content: str, call: tuple[str, dict[str, Any]], cuts: list[int]
) -> None:
    answer = parse(FORMS["llama"], f"{content}{written(LLAMA, *call)}", cuts)
    assert answer.content == content
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == [call]


@given(text=WORDS, cuts=st.lists(st.integers(0, 10_000), max_size=40), form=st.sampled_from(list(FORMS)))
def test_nothing_depends_on_the_split_whatever_the_text(text: str, cuts: list[int], form: str) -> None:
    for whole in (text, HERMES.begin + text, HERMES.begin + "f" + HERMES.middle + text, "<think>" + text):
        assert parse(FORMS[form], whole, cuts) == parse(FORMS[form], whole, [])


def test_arguments_come_as_they_are_written() -> None:
    parser = AnswerParser(FORMS["hermes"], with_calls=True, is_thinking=False)
    assert joined(parser.push('Yes.\n<tool_call>\n{"name": "f", "argu', False)) == Answer("Yes.")
    assert parser.push('ments": {"a": ', False) == [Part("call", '{"a": ', "f")]
    assert parser.push("1", False) == [Part("call", "1")]
    one, two = parser.push('}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}', False)
    assert (one, two) == (Part("call", "}"), Part("call", "{", "g"))
    assert parser.push("}\n</tool_call>", True) == [Part("call", "}")]


@pytest.mark.parametrize("cuts", [[], list(range(60))])
def test_a_prompt_may_have_begun_the_thoughts(cuts: list[int]) -> None:
    answer = parse(FORMS["qwen3"], "Let me see.\n</think>\n\n42", cuts, is_thinking=True)
    assert answer == Answer("42", "Let me see.")


def test_without_tools_what_looks_like_a_call_is_content() -> None:
    text = written(HERMES, "f", {})
    assert joined(AnswerParser(FORMS["qwen3"], False, False).push(text, True)) == Answer(text)


@pytest.mark.parametrize("end", range(1, 50))
def test_what_was_cut_off_in_a_call_has_the_arguments_so_far(end: int) -> None:
    text = written(HERMES, "f", {"a": "b"})[:end]
    arguments = text.partition(HERMES.middle)[2]
    for cuts in ([], list(range(60))):
        answer = parse(FORMS["hermes"], text, cuts)
        assert [so_far for _, so_far in answer.calls] == ([arguments] if HERMES.middle in text else [])
        assert answer.content == ("" if HERMES.middle in text else text)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Bob", "age": 3}',
        'Two:\n\n{"name": "Bob", "age": 3}\n',
        '{"name": "", "parameters": {}}',
        '{"name": "Bob\\", \\"parameters\\": ", "a": "}"}',
        '{"name": "' + "x" * 9000 + '"}',
        '{"name": "Bob", "param',
        '{"name": "Bob',
    ],
)
@pytest.mark.parametrize("cuts", [[], list(range(60))])
def test_json_that_begins_like_a_call_is_content(text: str, cuts: list[int]) -> None:
    assert parse(FORMS["llama"], text, cuts) == Answer(text)


def test_content_that_begins_like_a_call_comes_as_soon_as_it_is_none() -> None:
    parser = AnswerParser(FORMS["llama"], with_calls=True, is_thinking=False)
    assert parser.push('{"name": "Bob", ', False) == []
    assert joined(parser.push('"age"', False)) == Answer('{"name": "Bob", "age"')
    assert joined(parser.push(": 3}", True)) == Answer(": 3}")


def test_the_work_grows_with_the_text_only() -> None:
    """White space without end, which might always become the beginning of a call; and a great many calls."""
    parser = AnswerParser(FORMS["qwen3"], with_calls=True, is_thinking=False)
    assert sum(len(joined(parser.push("\n" * 50, False)).content) for _ in range(20_000)) > 999_000
    many = "\n".join([written(HERMES, "f", {})] * 10_000)
    assert len(joined(AnswerParser(FORMS["qwen3"], True, False).push(many, True)).calls) == 10_000
