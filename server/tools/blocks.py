"""From the text of an answer to its blocks in order: thoughts, text, and calls of tools, one after the other."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from evospec.server.generation import Piece
from evospec.server.tools.answer_parser import AnswerParser, Kind, Part


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
class Change:
    """A block begins, without text; ``text`` is added to it; or it has all of its text and ends."""

    kind: Literal["begin", "more", "end"]
    block: Block
    text: str = ""


class BlockWriter:
    """Writes the blocks of one answer. Each has ended before the next begins; the last ends with the answer.

    Attributes:
        blocks: those that have begun.
    """

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self.blocks: list[Block] = []

    def write(self, pieces: Sequence[Piece]) -> Iterator[Change]:
        """What pieces change, in order; the last piece of the answer ends the last block."""
        last = pieces[-1]
        text, is_last = "".join(piece.text for piece in pieces), last.finish_reason is not None
        for part in self._parser.push(text, is_last):
            yield from self._add(part)
        if is_last and self.blocks:
            self.blocks[-1].is_whole = last.is_ended_by_model
            yield Change("end", self.blocks[-1])

    def _add(self, part: Part) -> Iterator[Change]:
        if not self.blocks or self.blocks[-1].kind != part.kind or part.name:
            if self.blocks:
                yield Change("end", self.blocks[-1])
            self.blocks.append(Block(len(self.blocks), part.kind, part.name))
            yield Change("begin", self.blocks[-1])
        if part.text:
            self.blocks[-1].text += part.text
            yield Change("more", self.blocks[-1], part.text)
