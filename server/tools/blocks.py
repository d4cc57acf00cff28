"""From the text of an answer to its blocks in order: thoughts, text, and calls of tools, one after the other."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from server.generation import Piece
from server.tools.answer_parser import AnswerParser, AnswerPart
from server.tools.chat_format import ChatFormat

Kind = Literal["thoughts", "text", "call"]


@dataclass
class Block:
    """A part of an answer. ``text``: so far; of a call its arguments. ``is_whole``: nothing was cut off."""

    index: int
    kind: Kind
    name: str = ""
    text: str = ""
    is_whole: bool = True
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def arguments(self) -> dict[str, Any] | None:
        """Those of a call; None if it was cut off."""
        try:
            value = msgspec.json.decode(self.text)
        except (msgspec.DecodeError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Begin:
    """A block begins, without text."""

    block: Block


@dataclass(frozen=True)
class More:
    """``text`` was added to a block."""

    block: Block
    text: str


@dataclass(frozen=True)
class End:
    """A block has all of its text."""

    block: Block


Change = Begin | More | End


class BlockWriter:
    """Writes the blocks of one answer. Each has ended before the next begins; the last ends with the answer.

    Args:
        form: how the model writes answers.
        with_calls: whether it was given tools.
        is_thinking: whether the prompt has begun its thoughts.

    Attributes:
        blocks: those that have begun.
    """

    def __init__(self, form: ChatFormat, with_calls: bool, is_thinking: bool) -> None:
        self._parser = AnswerParser(form, with_calls, is_thinking)
        self.blocks: list[Block] = []
        self._call: int | None = None
        """Which call the last block is."""

    def write(self, pieces: Sequence[Piece]) -> Iterator[Change]:
        """What pieces change, in order; the last piece of the answer ends the last block."""
        last = pieces[-1]
        text, is_last = "".join(piece.text for piece in pieces), last.finish_reason is not None
        for part in self._parser.push_in_order(text, is_last):
            yield from self._take(part)
        if is_last and self.blocks:
            self.blocks[-1].is_whole = is_ended_by_model(last)
            yield End(self.blocks[-1])

    def _take(self, part: AnswerPart) -> Iterator[Change]:
        if part.reasoning:
            yield from self._add("thoughts", part.reasoning)
        if part.content:
            yield from self._add("text", part.content)
        for call in part.calls:
            yield from self._add("call", call.arguments, call.index, call.name)

    def _add(self, kind: Kind, text: str, call: int | None = None, name: str = "") -> Iterator[Change]:
        if not self.blocks or self.blocks[-1].kind != kind or self._call != call:
            if self.blocks:
                yield End(self.blocks[-1])
            self.blocks.append(Block(len(self.blocks), kind, name))
            self._call = call
            yield Begin(self.blocks[-1])
        if text:
            self.blocks[-1].text += text
            yield More(self.blocks[-1], text)


def is_ended_by_model(last: Piece) -> bool:
    """Whether a choice ends by the model's own doing: no stop string and no limit cut it off."""
    return last.finish_reason == "stop" and last.stop_reason is None
