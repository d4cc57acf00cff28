"""From the pieces of a generation to one answer or encoded events: the same for all endpoints that generate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response
from starlette.types import Receive

from evospec.server.errors import ApiError
from evospec.server.generation import Generation, Piece
from evospec.server.json_bodies import JsonResponse
from evospec.server.schemas.answers import AnswerBody, ResponseMetrics, Usage
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.schemas.fields import SamplingFields
from evospec.server.serving import Serving
from evospec.server.sse import DONE, EventStream, event, run_until_disconnect
from evospec.server.tools.answer_parser import AnswerParser
from evospec.server.tools.blocks import BlockWriter, Change


class Answer(ABC):
    """Turns the pieces of a generation into the response to a request, whole or a stream of events.

    An endpoint says how it encodes a whole answer, what an engine step adds to a stream, and how a stream ends.
    """

    def __init__(self, stream: bool | None, generation: Generation, serving: Serving) -> None:
        self._stream = stream
        self._generation = generation
        self._tokenizer = serving.tokenizer
        self._model = serving.model

    @abstractmethod
    async def collect(self) -> bytes:
        """The whole answer, generated and encoded."""

    @abstractmethod
    def encode_events(self, pieces: Sequence[Piece]) -> bytes:
        """The events of one engine step; empty if there is nothing in it to send."""

    @abstractmethod
    async def end(self) -> bytes:
        """The last events of a stream."""

    def encode_failure(self, error: ApiError) -> bytes:
        """The last events of a stream that has begun and fails."""
        return event(error.body())

    async def respond(self, receive: Receive) -> Response:
        """The response. Nothing of it is made once the client has gone away."""
        if self._stream:
            return EventStream(self.events(), self.encode_failure)
        return JsonResponse(await run_until_disconnect(receive, self.collect()))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """One item for all events of an engine step, then one for the end."""
        generation = self._generation
        async with aclosing(generation.run()) as steps:
            async for pieces in steps:
                if data := await generation.in_share(pieces, self.encode_events):
                    yield data
        yield await self.end()


class ChoicesAnswer(Answer):
    """The answer of both completion endpoints: a list of choices.

    An endpoint says how it calls its ids, which bodies it has for a whole answer and for an event of a stream, and what
    its choices look like.
    """

    id_prefix: ClassVar[str]
    whole: ClassVar[type[AnswerBody]]
    part: ClassVar[type[AnswerBody]]

    def __init__(self, body: SamplingFields, generation: Generation, serving: Serving) -> None:
        super().__init__(body.stream, generation, serving)
        self._options = body.stream_options

    @abstractmethod
    def choice(self, pieces: list[Piece]) -> msgspec.Struct:
        """A whole choice, made of its pieces."""

    @abstractmethod
    def part_of_choice(self, piece: Piece) -> msgspec.Struct | None:
        """The piece as a choice of an event; None if there is nothing in it to send."""

    async def collect(self) -> bytes:
        """All choices in one body."""
        return await self._generation.collect(self._encode_whole)

    async def end(self) -> bytes:
        """Usage and metrics if asked for, then the end mark."""
        if self._options and self._options.include_usage:
            return event(self._body(self.part, [], self._generation.usage(), self._generation.metrics())) + DONE
        return DONE

    def encode_events(self, pieces: Sequence[Piece]) -> bytes:
        """An event for each choice that the step adds to."""
        with_usage = self._options and self._options.continuous_usage_stats
        usage = self._generation.usage() if with_usage else None
        choices = [choice for piece in pieces if (choice := self.part_of_choice(piece)) is not None]
        return b"".join(event(self._body(self.part, [choice], usage, UNSET)) for choice in choices)

    def _encode_whole(self, pieces: Sequence[Piece]) -> bytes:
        parts: dict[int, list[Piece]] = {}
        for piece in pieces:
            parts.setdefault(piece.index, []).append(piece)
        # A choice is encoded by itself, because the encoder keeps all threads waiting.
        choices = [msgspec.Raw(msgspec.json.encode(self.choice(parts[index]))) for index in sorted(parts)]
        return msgspec.json.encode(
            self._body(self.whole, choices, self._generation.usage(), self._generation.metrics())
        )

    def _body(
        self,
        kind: type[AnswerBody],
        choices: list[Any],
        usage: Usage | None,
        metrics: ResponseMetrics | UnsetType,
    ) -> AnswerBody:
        return kind(
            id=f"{self.id_prefix}-{self._generation.id}",
            created=self._generation.created,
            model=self._model,
            choices=choices,
            usage=usage,
            metrics=metrics,
        )


class BlocksAnswer(Answer):
    """The answer to one conversation as blocks, one after the other: of OpenAI's Responses and Anthropic's Messages.

    An API says what its events and its whole answer look like. ``chat`` is the request, as one for chat.
    """

    def __init__(
        self, chat: ChatCompletionRequest, generation: Generation, serving: Serving, is_thinking: bool
    ) -> None:
        super().__init__(chat.stream, generation, serving)
        self._writer = BlockWriter(AnswerParser(serving.chat_format, bool(chat.usable_tools), is_thinking))
        self._last: Piece | None = None

    @abstractmethod
    def whole(self) -> msgspec.Struct:
        """The whole answer, once all is generated."""

    @abstractmethod
    def begin(self) -> bytes:
        """The events before the first block."""

    @abstractmethod
    def change(self, change: Change) -> bytes:
        """The events that say what has changed."""

    async def collect(self) -> bytes:
        """The whole answer, encoded. Its events are made, too, and nobody reads them."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return msgspec.json.encode(self.whole())

    def encode_events(self, pieces: Sequence[Piece]) -> bytes:
        """What the pieces of one engine step change."""
        begin = self.begin() if self._last is None else b""
        self._last = pieces[-1]
        return begin + b"".join(map(self.change, self._writer.write(pieces)))
