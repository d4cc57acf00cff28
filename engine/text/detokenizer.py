"""Text from token ids as they come, never splitting a character; and stop strings in a text stream."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What detokenisation needs of ``engine.text.tokenizer.Tokenizer``."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for special tokens and ids beyond the vocabulary."""


class IncrementalDetokenizer:
    """Turns token ids into text, chunk by chunk.

    The chunks, joined, are the decoding of all ids, however they were split. A character whose bytes
    span tokens appears once it is complete. Bytes that are no UTF-8 become U+FFFD; special tokens vanish.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))

    def finish(self) -> str:
        """What is left of an incomplete character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopStringFinder:
    """Finds the stop string that is complete first in a text that arrives in chunks.

    Of several that end at the same character the longest wins, so the result depends on the text only,
    not on its chunks.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._keep = max(map(len, self._stop), default=1) - 1
        self._tail = ""
        self._length = 0

    def push(self, text: str) -> tuple[str, int] | None:
        """The stop string that ``text`` completes and its start in the whole text, if there is one."""
        window = self._tail + text
        window_start = self._length - len(self._tail)
        matches = [
            (start + len(stop), -len(stop), stop)
            for stop in self._stop
            if (start := window.find(stop, max(0, len(self._tail) + 1 - len(stop)))) >= 0
        ]
        self._length += len(text)
        self._tail = window[-self._keep :] if self._keep else ""
        if not matches:
            return None
        end, _, stop = min(matches)
        return stop, window_start + end - len(stop)


class StopStringBuffer:
    """Holds back the end of streamed text while it may be the beginning of a stop string.

    What ``push`` released before the chunk that completes a stop string never reaches into that string;
    that chunk itself is to be cut at ``EngineOutput.text_length``.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is now sure to be output."""
        text = self._held + text
        released = len(text) - self._beginning_of_stop(text)
        self._held = text[released:]
        return text[:released]

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that is a stop string's beginning, but not all of one."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            suffix = text[start:]
            if any(len(stop) > len(suffix) and stop.startswith(suffix) for stop in self._stop):
                return len(suffix)
        return 0
