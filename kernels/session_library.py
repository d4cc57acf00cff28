"""The library of compiled sessions, and how it is called: structures, arrays, memory (kernels/csrc/sessions).

Plain C++ without instructions of special processors: it is part of the compiled CPU kernels, and a library of its own
where a machine cannot run those. Importing this imports no torch.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kernels.session_options import MAX_REPEATS, NUM_FEATURES, SOURCES
from kernels.targets import PLAIN, best_target, load_of_these_sources

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
    _fields_ = (("rows", INT), *((name, POINTER) for name in ("sessions", "tenants", "begins", "tokens")))


class LessonStruct(ctypes.Structure):
    _fields_ = (
        ("rows", TokenRowsStruct),
        *((name, POINTER) for name in ("num_accepted", "num_drafts", "chosen", "likely")),
        *((name, INT) for name in ("num_chosen", "k")),
    )


class DraftStepStruct(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("rows", "columns", "num_drafts")),
        *((name, POINTER) for name in ("sessions", "texts", "drafts", "tokens", "logits", "scores", "best", "repeats")),
    )


class TableStruct(ctypes.Structure):
    _fields_ = (*((name, POINTER) for name in ("keys", "tokens", "counts")), ("width", INT), ("shift", INT))


def missing_reason() -> str | None:
    """Why sessions cannot be had in this process; None where they can."""
    return None if _of_these_sources() else "the compiled kernels are missing, or out of date (python -m kernels.build)"


@functools.cache
def load() -> Any:
    """The library; check ``missing_reason`` first."""
    library = _of_these_sources()
    if library is None:
        raise RuntimeError(missing_reason())
    for name in ("evo_sessions_new", "evo_sessions_take_writes", "evo_sessions_unigrams", "evo_sessions_weights"):
        getattr(library, name).restype = POINTER
    library.evo_texts_new.restype = POINTER
    library.evo_sessions_counts.restype = ctypes.POINTER(SessionCounts)
    library.evo_sessions_state.restype = ctypes.POINTER(StateStruct)
    library.evo_sessions_ngrams.restype = TableStruct
    library.evo_sessions_bytes.restype = library.evo_texts_bytes.restype = INT64
    return library


def _of_these_sources() -> Any:
    best = best_target()
    return (best and load_of_these_sources(best)) or load_of_these_sources(PLAIN)


def joined(tokens: Sequence[Sequence[int]]) -> tuple[array[int], array[int]]:
    """Where each row's tokens begin, and all of them."""
    return array("i", accumulate(map(len, tokens), initial=0)), array("i", chain.from_iterable(tokens))


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
    """Tokens of some sessions, as the library takes them. (A small array of Python's costs a fraction of NumPy's.)

    Args:
        sessions: one a row.
        tenants: tables of their tenants; None without.
        tokens: of each.
    """

    def __init__(self, sessions: Sequence[int], tenants: Sequence[int] | None, tokens: Sequence[Sequence[int]]) -> None:
        begins, self.tokens = joined(tokens)
        self._arrays = [array("i", sessions), array("i", tenants or ()), begins, self.tokens]
        own, of_tenants, begin, token = (values.buffer_info()[0] for values in self._arrays)
        self.struct = TokenRowsStruct(len(sessions), own, None if tenants is None else of_tenants, begin, token)


class DraftStep:
    """Rows of a batch whose next draft token is chosen.

    Args:
        sessions: of each row; -1 for none.
        texts: of each row; -1 for none.
    """

    def __init__(self, sessions: Sequence[int], texts: Sequence[int]) -> None:
        self._sessions, self._texts = array("i", sessions), array("i", texts)
        self._repeats, self._drafts = zeros(len(sessions) * (2 * MAX_REPEATS + 1)), array("i")
        self._best = zeros(len(sessions))
        self.struct = DraftStepStruct(len(sessions))
        self.struct.sessions, self.struct.texts = self._sessions.buffer_info()[0], self._texts.buffer_info()[0]
        self.struct.repeats, self.struct.best = self._repeats.buffer_info()[0], self._best.buffer_info()[0]

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def best(self) -> list[int]:
        """The token of each row with the largest score; -1 for none."""
        return self._best.tolist()

    def go_on(self, drafts: Sequence[Sequence[int]]) -> None:
        """The next token comes after these, as many for each row."""
        self._drafts = array("i", chain.from_iterable(drafts))
        self.struct.drafts, self.struct.num_drafts = self._drafts.buffer_info()[0], len(drafts[0])
