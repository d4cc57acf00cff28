"""Text from token ids as they come, never splitting a character; and stop strings in a text stream."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import numpy as np

_NO_CHARACTER = "\ud800"
"""What fills up shorter stop strings: half of a character, which no text has."""


class IncrementalDetokenizer:
    """Turns token ids into text, chunk by chunk. ``token_bytes``: as ``Tokenizer.token_bytes``.

    The chunks, joined, are the decoding of all ids, however they were split. A character whose bytes
    span tokens appears once it is complete. Bytes that are no UTF-8 become U+FFFD; special tokens vanish.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def finish(self) -> str:
        """What is left of an incomplete character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class _Places(dict[str, int]):
    """Where each character occurs in several strings: a bit for each place, filled in as it is asked for.

    The bits of all first characters come first, then those of all second ones, and so on.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._characters = "".join(map("".join, zip_longest(*strings, fillvalue=_NO_CHARACTER)))

    def __missing__(self, character: str) -> int:
        characters = np.frombuffer(self._characters.encode("utf-32-le", "surrogatepass"), np.uint32)
        bits = np.packbits(characters == ord(character), bitorder="little")
        self[character] = int.from_bytes(bits.tobytes(), "little")
        return self[character]


class StopStringFinder:
    """Finds the stop string that is complete first in a text that arrives in chunks.

    Of several that end at the same character the longest wins, so the result depends on the text only,
    not on its chunks.

    A character takes a few operations on whole numbers, whatever stop strings and text are. This is "shift-and"
    (Baeza-Yates and Gonnet): a bit is set while the text ends with all of a stop string up to that place.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._first_characters = {one[0] for one in self._stop}
        self._places = _Places(self._stop)
        self._firsts = (1 << len(self._stop)) - 1
        self._ends = sum(1 << (len(one) - 1) * len(self._stop) + number for number, one in enumerate(self._stop))
        self._bits = 0
        self._length = 0

    @property
    def num_begun(self) -> int:
        """Length of the longest end of the text that is a stop string's beginning, but not all of one."""
        return -(-(self._bits & ~self._ends).bit_length() // max(len(self._stop), 1))

    def push(self, text: str) -> tuple[str, int] | None:
        """The stop string that ``text`` completes and its start in the whole text, if there is one."""
        if not self._bits and self._first_characters.isdisjoint(text):  # as most of it
            self._length += len(text)
            return None
        found: tuple[str, int] | None = None
        bits, places, firsts, ends, count = self._bits, self._places, self._firsts, self._ends, len(self._stop)
        for end, character in enumerate(text, self._length + 1):
            bits = (bits << count | firsts) & places[character]
            if bits & ends and found is None:
                stop = self._stop[((bits & ends).bit_length() - 1) % count]
                found = stop, end - len(stop)
        self._bits = bits
        self._length += len(text)
        return found


class StopStringBuffer:
    """Holds back the end of streamed text while it may be the beginning of a stop string.

    What ``push`` released before the chunk that completes a stop string never reaches into that string;
    that chunk itself is to be cut at ``EngineOutput.text_length``.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._finder = StopStringFinder(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is now sure to be output."""
        self._finder.push(text)
        text = self._held + text
        released = len(text) - self._finder.num_begun
        self._held = text[released:]
        return text[:released]

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held
