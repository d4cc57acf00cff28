"""ctypes binding of the texts in which repeats are found (kernels/csrc/sessions/text_index.cpp)."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence

from evospec.kernels.session_library import INT, POINTER, TextStruct, TokenRows, address_of, load, zeros
from evospec.kernels.session_options import MAX_REPEATS


class Texts:
    """Texts of running sequences, the last ``capacity`` tokens of each, searched for repeats of their ends."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self._library, self.num_slots = load(), num_slots
        self.handle = POINTER(self._library.evo_texts_new(num_slots, capacity))
        weakref.finalize(self, self._library.evo_texts_free, self.handle).atexit = False

    @property
    def num_bytes(self) -> int:
        """Memory of one text."""
        return int(self._library.evo_texts_bytes(self.handle))

    def arrays(self) -> TextStruct:
        """Where all texts are, that of slot 0 first."""
        arrays: TextStruct = self._library.evo_texts_arrays(self.handle)
        return arrays

    def clear(self, slot: int) -> None:
        """Begin a text."""
        self._library.evo_texts_clear(self.handle, slot)

    def extend(self, rows: TokenRows) -> None:
        """Append to some texts."""
        self._library.evo_texts_extend(self.handle, ctypes.byref(rows.struct))

    def copy(self, slots: Sequence[int], most: int) -> tuple[list[list[int]], list[int]]:
        """What followed the longest repeat of each text's end, ``most`` tokens, and the repeat's length (0: none)."""
        of_slots, copies, lengths = array("i", slots), zeros(most * len(slots)), zeros(len(slots))
        self._library.evo_texts_copy(
            self.handle, len(slots), address_of(of_slots), most, address_of(copies), address_of(lengths)
        )
        return [copies[row * most : (row + 1) * most].tolist() for row in range(len(slots))], lengths.tolist()

    def find(self, slot: int, after: Sequence[int] = ()) -> dict[int, int]:
        """Tokens that followed a repeat of a text's end, with the length of the longest such repeat.

        Args:
            slot: of the text.
            after: tokens that it is taken to go on with, such as drafts.
        """
        tokens, found, lengths = array("i", after), (INT * MAX_REPEATS)(), (INT * MAX_REPEATS)()
        count = self._library.evo_texts_find(self.handle, slot, address_of(tokens), len(tokens), found, lengths)
        return dict(zip(found[:count], lengths[:count], strict=True))
