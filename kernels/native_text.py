"""ctypes binding of the compiled index of a text's repeats (kernels/csrc/text_index.cpp).

The library is loaded when it is wanted, as by ``kernels.native_prior``.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

MAX_PLACES = 16
"""Earlier places that are looked at, the latest first; as in ``text_index.h``."""
_Found = ctypes.c_int32 * MAX_PLACES


class NativeTextIndex:
    """As ``engine.vocab.text_matches.TextMatches``, but it can only be extended and searched."""

    def __init__(self) -> None:
        from kernels.native import load_library

        self._library: Any = load_library()
        self._handle = ctypes.c_void_p(self._library.evo_text_new())
        self._size, self._length = 0, ctypes.c_int32()
        self.address = int(self._handle.value or 0)
        """For ``kernels.native_chain``."""

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.evo_text_free(self._handle)

    def __len__(self) -> int:
        return self._size

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append to the text."""
        tokens = array("i", token_ids)
        self._library.evo_text_extend(self._handle, ctypes.c_void_p(tokens.buffer_info()[0]), len(tokens))
        self._size += len(tokens)

    def find(self, after: Sequence[int] = ()) -> dict[int, int]:
        """Tokens that followed a repeat of the text's end, with the length of the longest such repeat."""
        tokens, found, lengths = array("i", after), _Found(), _Found()
        begin = ctypes.c_void_p(tokens.buffer_info()[0])
        count = self._library.evo_text_find(self._handle, begin, len(tokens), found, lengths)
        return dict(zip(found[:count], lengths[:count], strict=True))

    def longest(self) -> tuple[int, int]:
        """The place right after the longest repeat of the text's end, and its length; (-1, 0) for none."""
        place: int = self._library.evo_text_longest(self._handle, ctypes.byref(self._length))
        return place, self._length.value
