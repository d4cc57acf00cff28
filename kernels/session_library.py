"""The library of compiled sessions, and how it is called: structures, arrays, memory (kernels/csrc/sessions).

Plain C++ without instructions of special processors: it is part of the compiled CPU kernels, and a library of its own
where a machine cannot run those. Importing this imports no torch.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from evospec.kernels.session_options import MAX_REPEATS, NUM_FEATURES, SOURCES
from evospec.kernels.targets import PLAIN, best_target, load_of_these_sources

if TYPE_CHECKING:
    import torch

POINTER, INT, INT64, FLOAT, DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)


class SessionCounts(ctypes.Structure):
    """How a session has fared since it began; see ``SessionCounts`` in sessions.h."""

    _fields_ = (
        *((name, INT64) for name in ("verified", "covered", "events")),
        *((name, INT64 * len(SOURCES)) for name in ("insertions", "hits")),
        *((name, INT64) for name in ("num_read", "num_counted", "num_lessons")),
    )

    def by_source(self, name: Literal["insertions", "hits"]) -> dict[str, int]:
        """Those that are not 0."""
        return {source: count for source, count in zip(SOURCES, getattr(self, name), strict=True) if count}


class StateStruct(ctypes.Structure):
    _fields_ = (
        *((name, DOUBLE) for name in ("unit", "gain")),
        ("last", INT * 2),
        ("left", INT),
        ("missed", ctypes.c_uint32),
        *((name, INT) for name in ("row", "num_drafted")),
    )


class GraphStruct(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("offsets", "tokens", "log_probs")),
        ("width", INT),
        ("scale", FLOAT),
    )


class OptionsStruct(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("sessions", "vocab", "places")),
        *((name, INT) for name in ("bigram_rows", "bigram_width", "trigram_rows", "trigram_width")),
        *((name, INT) for name in ("tenants", "tenant_rows", "tenant_width")),
        *((name, INT) for name in ("only_recency", "in_context", "learns")),
        ("uses", FLOAT * NUM_FEATURES),
        *((name, FLOAT) for name in ("rate", "most_weight", "gain_memory")),
        *((name, DOUBLE) for name in ("growth", "presence")),
        ("in_core", POINTER),
        ("graph", GraphStruct),
    )


class TokenRowsStruct(ctypes.Structure):
    _fields_ = (("count", INT), *((name, POINTER) for name in ("rows", "tokens")))


class LessonStruct(ctypes.Structure):
    _fields_ = (
        ("rows", TokenRowsStruct),
        *((name, POINTER) for name in ("chosen", "likely")),
        *((name, INT) for name in ("num_chosen", "k")),
    )


class DraftStepStruct(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("rows", "columns", "num_drafts", "num_included")),
        *((name, POINTER) for name in ("sessions", "texts", "drafts", "tokens", "logits")),
        *((name, POINTER) for name in ("best", "repeats", "included")),
    )


class TableStruct(ctypes.Structure):
    _fields_ = (*((name, POINTER) for name in ("keys", "tokens", "counts")), ("width", INT), ("shift", INT))


class ScoredStruct(ctypes.Structure):
    _fields_ = (*((name, INT) for name in ("rounds", "rows", "columns")), ("block", POINTER))


class TextStruct(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("tokens", "previous", "latest", "size")),
        *((name, INT) for name in ("capacity", "buckets")),
        ("factor", INT64),
    )


def missing_reason() -> str | None:
    """Why sessions cannot be had in this process; None where they can."""
    return (
        None
        if _of_these_sources()
        else "the compiled kernels are missing, or out of date (python -m evospec.kernels.build)"
    )


@functools.cache
def load() -> Any:
    """The library; check ``missing_reason`` first."""
    library = _of_these_sources()
    if library is None:
        raise RuntimeError(missing_reason())
    for name in ("new", "begin_drafts", "take_writes", "unigrams", "weights"):
        getattr(library, f"evo_sessions_{name}").restype = POINTER
    library.evo_texts_new.restype = POINTER
    library.evo_sessions_counts.restype = ctypes.POINTER(SessionCounts)
    library.evo_sessions_state.restype = ctypes.POINTER(StateStruct)
    library.evo_sessions_ngrams.restype = TableStruct
    library.evo_texts_arrays.restype = TextStruct
    library.evo_sessions_bytes.restype = library.evo_texts_bytes.restype = INT64
    return library


def _of_these_sources() -> Any:
    best = best_target()
    return (best and load_of_these_sources(best)) or load_of_these_sources(PLAIN)


def zeros(count: int) -> array[int]:
    return array("i", bytes(4 * count))


def address_of(values: array[int]) -> ctypes.c_void_p:
    return POINTER(values.buffer_info()[0])


def view_of(place: int, dtype: Any, *shape: int) -> NDArray[Any]:
    """Memory of the library as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_char * size).from_address(place)
    return np.frombuffer(buffer, dtype).reshape(shape)


class TokenRows:
    """Tokens that some sequences have got, as the library takes them."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[int] = []
        self._struct: TokenRowsStruct | None = None

    def add(
        self,
        slot: int,
        tokens: Sequence[int],
        tenant: int = -1,
        text: int = -1,
        num_accepted: int = 0,
        num_drafts: int = 0,
    ) -> None:
        """Tokens of one more sequence.

        Args:
            slot: of its session or text.
            tokens: that it has got.
            tenant: table of its tenant; -1 for none.
            text: which goes on with the same tokens; -1 for none.
            num_accepted: how many of the tokens were drafted.
            num_drafts: how many drafts were verified.
        """
        self._tokens += tokens
        self._rows += (slot, text, tenant, len(self._tokens), num_accepted, num_drafts)

    def __len__(self) -> int:
        return len(self._rows) // 6

    @property
    def struct(self) -> TokenRowsStruct:
        """All of them: nothing is added from here on, and this object must outlive it."""
        if self._struct is None:
            rows, tokens = self._arrays = array("i", self._rows), array("i", self._tokens)
            self._struct = TokenRowsStruct(len(self), rows.buffer_info()[0], tokens.buffer_info()[0])
        return self._struct


class DraftStep:
    """Rows of a batch whose next draft token is chosen. (A small array of Python's costs a fraction of NumPy's.)

    Args:
        sessions: of each row; -1 for none.
        texts: of each row; -1 for none.
    """

    def __init__(self, sessions: Sequence[int], texts: Sequence[int]) -> None:
        self.sessions, self.texts = sessions, texts
        self._slots, self._drafts = (array("i", sessions), array("i", texts)), array("i")
        self._best, self._repeats = zeros(len(sessions)), zeros(len(sessions) * (2 * MAX_REPEATS + 1))
        self._included = np.empty((2, len(sessions) * MAX_REPEATS), np.int32)
        self._struct = struct = DraftStepStruct(len(sessions))
        self.pointer = ctypes.byref(struct)
        struct.sessions, struct.texts = (slots.buffer_info()[0] for slots in self._slots)
        struct.best, struct.repeats = self._best.buffer_info()[0], self._repeats.buffer_info()[0]
        struct.included = self._included.ctypes.data

    def __len__(self) -> int:
        return len(self.sessions)

    @property
    def best(self) -> list[int]:
        """The token of each row with the largest score; any where no score is a number."""
        return self._best.tolist()

    def included(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows [n] and tokens [n], int32, of the candidates that were included."""
        rows, tokens = self._included[:, : self._struct.num_included]
        return rows, tokens

    def go_on(self, drafts: Sequence[Sequence[int]], token_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """The next token comes after ``drafts``, as many for each row.

        Args:
            drafts: of each row.
            token_ids: [B, C] int32 on the CPU, what it is chosen among; -1 for none.
            logits: [B, C] float32 on the CPU, of these; -inf for none.
        """
        self._drafts, struct = array("i", chain.from_iterable(drafts)), self._struct
        self._candidates = token_ids, logits  # they must outlive what the structure says of them
        struct.drafts, struct.num_drafts = self._drafts.buffer_info()[0], len(drafts[0])
        struct.tokens, struct.logits, struct.columns = token_ids.data_ptr(), logits.data_ptr(), token_ids.shape[1]
