"""Blocks of an answer: the same however the text was split, one after the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.server.generation import Piece
from evospec.server.tools.answer_parser import AnswerParser
from evospec.server.tools.blocks import Block, BlockWriter, Change
from evospec.server.tools.chat_format import HERMES, ChatFormat

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\n"}}\n</tool_call>'
TEXT = f"<think>\nHm\n</think>\n\nOne:\n{CALL}\n{CALL}\nThen {CALL}"
ARGUMENTS = '{"a": "}\\n"}'


def piece(text: str, finish_reason: Any = None, stop_reason: Any = None) -> Piece:
    return Piece(0, False, text, [], [], finish_reason, stop_reason)


def check(changes: list[Change]) -> list[tuple[str, str, str]]:
    """The blocks that the changes make: each begins, goes on and ends before the next."""
    blocks: list[tuple[str, str, str]] = []
    open_block: Block | None = None
    for change in changes:
        block = change.block
        match change.kind:
            case "begin":
                assert open_block is None
                assert block.index == len(blocks)
                open_block, text = block, ""
            case "more":
                assert block is open_block
                assert change.text
                text += change.text
            case "end":
                assert block is open_block
                assert block.text == text
                blocks.append((block.kind, block.name, text))
                open_block = None
    assert open_block is None
    return blocks


@given(st.lists(st.integers(0, len(TEXT)), max_size=40))
def test_no_split_changes_the_blocks(cuts: list[int]) -> None:
    writer = BlockWriter(AnswerParser(ChatFormat(HERMES, thinks=True), with_calls=True, is_thinking=False))
    ends = [0, *sorted(cuts), len(TEXT)]
    changes: list[Change] = []
    for begin, end in pairwise(ends):
        changes += writer.write([piece(TEXT[begin:end])])
    changes += writer.write([piece("", "stop")])
    call = ("call", "f", ARGUMENTS)
    assert check(changes) == [("thoughts", "", "Hm"), ("text", "", "One:"), call, call, ("text", "", "\nThen "), call]
    assert all(block.is_whole for block in writer.blocks)
    assert writer.blocks[-1].arguments() == {"a": "}\n"}


@pytest.mark.parametrize("end", [("length", None), ("stop", "x")])
def test_a_call_that_is_cut_off_is_not_whole(end: tuple[str, Any]) -> None:
    writer = BlockWriter(AnswerParser(ChatFormat(HERMES, thinks=False), with_calls=True, is_thinking=False))
    assert check([*writer.write([piece(CALL[:45], *end)])])[0][:2] == ("call", "f")
    [block] = writer.blocks
    assert not block.is_whole
    assert block.arguments() is None


def test_an_answer_without_text_has_no_blocks() -> None:
    writer = BlockWriter(AnswerParser(ChatFormat(None, thinks=False), with_calls=False, is_thinking=False))
    assert [*writer.write([piece("", "stop")])] == []
