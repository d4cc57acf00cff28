"""An answer as blocks, one after the other: what OpenAI's Responses and Anthropic's Messages have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import aclosing

import msgspec

from server.answer import Answer
from server.generation import Generation, Piece
from server.schemas.chat import ChatCompletionRequest
from server.serving import Serving
from server.tools.blocks import BlockWriter, Change


class BlocksAnswer(Answer):
    """The answer to one conversation. An API says what its events and its whole answer look like.

    Args:
        chat: the request, as one for chat.
        is_thinking: whether the prompt has begun the model's thoughts.
    """

    def __init__(
        self, chat: ChatCompletionRequest, generation: Generation, serving: Serving, is_thinking: bool
    ) -> None:
        super().__init__(chat.stream, generation, serving)
        self._writer = BlockWriter(serving.chat_format, bool(chat.usable_tools), is_thinking)
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
