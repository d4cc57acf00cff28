"""From the pieces of a generation to encoded events, or to one answer: the same for both completion endpoints."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from server.generation import Generation, Piece
from server.schemas.fields import StreamOptions
from server.schemas.metrics import ResponseMetrics
from server.schemas.usage import Usage
from server.sse import DONE, event

ChoiceT = TypeVar("ChoiceT")


async def stream_events(
    generation: Generation,
    options: StreamOptions | None,
    to_choice: Callable[[Piece], ChoiceT | None],
    to_chunk: Callable[[list[ChoiceT], Usage | None, ResponseMetrics | UnsetType], msgspec.Struct],
) -> AsyncGenerator[bytes, None]:
    """One item for all choices of an engine step, then usage and metrics if asked for, then the end mark.

    ``to_choice`` gives None for a piece with nothing in it to send.
    """
    continuous = bool(options and options.continuous_usage_stats)

    def encode(pieces: Sequence[Piece]) -> bytes:
        usage = generation.usage() if continuous else None
        choices = [choice for piece in pieces if (choice := to_choice(piece)) is not None]
        return b"".join(event(to_chunk([choice], usage, UNSET)) for choice in choices)

    async with aclosing(generation.run()) as steps:
        async for pieces in steps:
            if data := await generation.in_share(pieces, encode):
                yield data
    if options and options.include_usage:
        yield event(to_chunk([], generation.usage(), generation.metrics()))
    yield DONE


async def whole_answer(
    generation: Generation,
    to_choice: Callable[[list[Piece]], msgspec.Struct],
    to_answer: Callable[[list[Any]], msgspec.Struct],
) -> bytes:
    """The encoded answer of all choices, each made of its pieces.

    A choice is encoded by itself, because the encoder keeps all threads waiting.
    """

    def encode(pieces: Sequence[Piece]) -> bytes:
        parts: dict[int, list[Piece]] = {}
        for piece in pieces:
            parts.setdefault(piece.index, []).append(piece)
        choices = [msgspec.Raw(msgspec.json.encode(to_choice(parts[index]))) for index in sorted(parts)]
        return msgspec.json.encode(to_answer(choices))

    async with aclosing(generation.run()) as steps:
        pieces = [piece async for step in steps for piece in step]
    return await generation.in_share(pieces, encode)
