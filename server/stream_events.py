"""From the pieces of a generation to encoded events: the same for both completion endpoints."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

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
    async with aclosing(generation.run()) as steps:
        async for pieces in steps:
            usage = generation.usage() if continuous else None
            choices = [choice for piece in pieces if (choice := to_choice(piece)) is not None]
            if choices:
                yield b"".join(event(to_chunk([choice], usage, UNSET)) for choice in choices)
    if options and options.include_usage:
        yield event(to_chunk([], generation.usage(), generation.metrics()))
    yield DONE
