"""ctypes bindings of sessions and texts (kernels/csrc/sessions): one call for a batch, however many sequences it has.

Plain C++ without instructions of special processors: it is part of the compiled CPU kernels, and a library of its own
where a machine cannot run those. Importing this imports no torch.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.targets import PLAIN, best_target, load_of_these_sources

NUM_FEATURES = 5
SOURCES = ("snapshot", "tenant", "context", "target", "graph", "semantic")
"""What named a token of a tail: the session's or the tenant's past, its own text, the target, an index."""
WAYS = 8
"""Rows of a table in which a context can live."""
MAX_REPEATS = 16
"""Places of a repeat that are looked at."""

_POINTER, _INT, _INT64, _FLOAT, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)


class _Counts(ctypes.Structure):
    _fields_ = (
        *((name, _INT64) for name in ("verified", "covered", "events")),
        *((name, _INT64 * len(SOURCES)) for name in ("insertions", "hits")),
        *((name, _INT64) for name in ("num_read", "num_counted", "num_lessons")),
    )


class _State(ctypes.Structure):
    _fields_ = (("unit", _DOUBLE), ("gain", _DOUBLE), ("last", _INT * 2), ("left", _INT), ("missed", ctypes.c_uint32))


class _Graph(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("offsets", "tokens", "log_probs")),
        ("width", _INT),
        ("scale", _FLOAT),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("sessions", "vocab", "places")),
        *((name, _INT) for name in ("bigram_rows", "bigram_width", "trigram_rows", "trigram_width")),
        *((name, _INT) for name in ("tenants", "tenant_rows", "tenant_width")),
        *((name, _INT) for name in ("only_recency", "in_context", "learns")),
        ("uses", _FLOAT * NUM_FEATURES),
        *((name, _FLOAT) for name in ("rate", "most_weight", "gain_memory")),
        *((name, _DOUBLE) for name in ("growth", "presence")),
        ("in_core", _POINTER),
        ("graph", _Graph),
    )


class _TokenRows(ctypes.Structure):
    _fields_ = (("rows", _INT), *((name, _POINTER) for name in ("sessions", "tenants", "begins", "tokens")))


class _DraftedRows(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("num_accepted", "num_reached", "places", "tokens", "logits", "features")),
        ("columns", _INT),
    )


class _DraftStep(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("rows", "columns", "num_drafts")),
        *((name, _POINTER) for name in ("sessions", "texts", "drafts", "tokens", "logits", "features", "scores")),
        *((name, _POINTER) for name in ("matched", "lengths", "num_matched")),
    )


class _Table(ctypes.Structure):
    _fields_ = (*((name, _POINTER) for name in ("keys", "tokens", "counts")), ("width", _INT), ("shift", _INT))


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
        getattr(library, name).restype = _POINTER
    library.evo_texts_new.restype = _POINTER
    library.evo_sessions_counts.restype = ctypes.POINTER(_Counts)
    library.evo_sessions_state.restype = ctypes.POINTER(_State)
    library.evo_sessions_ngrams.restype = _Table
    library.evo_sessions_bytes.restype = library.evo_texts_bytes.restype = _INT64
    return library


def _of_these_sources() -> Any:
    best = best_target()
    return (best and load_of_these_sources(best)) or load_of_these_sources(PLAIN)


@dataclass(frozen=True)
class Table:
    """A session's counts of one order: ``keys`` [R] int64, -1 for none; ``token_ids`` [R, W]; ``counts`` [R, W].

    A context lives in one of the ``WAYS`` rows from the one on that the first 64 - ``shift`` bits of its hash name.
    """

    keys: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    counts: NDArray[np.float32]
    shift: int


@dataclass(frozen=True)
class TableSizes:
    """Contexts (a power of 2), and continuations of each: 592 KiB a session, and 4 bytes for each token."""

    bigram_rows: int = 2048
    bigram_width: int = 16
    trigram_rows: int = 8192
    trigram_width: int = 4


@dataclass(frozen=True)
class GraphArrays:
    """Followers of each token, the most likely first: those of u at ``offsets[u]`` .. ``offsets[u + 1] - 1``.

    The prior looks at ``width`` of them; the value of one is 1 + its log-probability times ``scale``.
    """

    offsets: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    width: int
    scale: float


@dataclass(frozen=True)
class SessionOptions:
    """How sessions learn, and what fills their tails."""

    num_sessions: int
    num_places: int
    """Tokens of a tail; 0: there are no tails."""
    only_recency: bool = False
    """Whether a full tail forgets what was used longest ago (LRU), instead of by ARC."""
    in_context: bool = True
    """Whether a sequence's own tokens enter its tail."""
    learns: bool = True
    """Whether the prior's weights follow verification."""
    uses: Sequence[bool] = (True,) * NUM_FEATURES
    """Which features of the prior count."""
    learning_rate: float = 0.05
    most_weight: float = 10.0
    gain_memory: float = 0.99
    """Weight of the past, for each position, in what the prior has gained."""
    half_life: float = 4096.0
    """Tokens after which a count is worth half."""
    presence: float = 0.05
    """A token with fewer decayed occurrences is one that the session has left behind."""
    num_tenants: int = 0
    """Tables of what followed what in each tenant's texts; 0: nothing enters tails by that."""
    tenant_rows: int = 4096
    tenant_width: int = 16
    sizes: TableSizes = TableSizes()


@dataclass(frozen=True)
class Drafted:
    """What draft tokens were chosen from: tokens and logits [.., C], features [.., NUM_FEATURES, C]."""

    token_ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    features: NDArray[np.float32]


class Texts:
    """Texts of running sequences, the last ``capacity`` tokens of each, searched for repeats of their ends."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self._library = load()
        self.handle = _POINTER(self._library.evo_texts_new(num_slots, capacity))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.evo_texts_free(self.handle)

    @property
    def num_bytes(self) -> int:
        """Memory of one text."""
        return int(self._library.evo_texts_bytes(self.handle))

    def clear(self, slot: int) -> None:
        """Begin a text."""
        self._library.evo_texts_clear(self.handle, slot)

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Append to some texts."""
        arrays = array("i", slots), *_joined(tokens)
        self._library.evo_texts_extend(self.handle, len(slots), *map(_at, arrays))

    def copy(self, slots: Sequence[int], most: int) -> tuple[list[list[int]], list[int]]:
        """What followed the longest repeat of each text's end, ``most`` tokens, and the repeat's length (0: none)."""
        of_slots, copies, lengths = array("i", slots), _zeros(most * len(slots)), _zeros(len(slots))
        self._library.evo_texts_copy(self.handle, len(slots), _at(of_slots), most, _at(copies), _at(lengths))
        return [copies[row * most : (row + 1) * most].tolist() for row in range(len(slots))], lengths.tolist()

    def find(self, slot: int, after: Sequence[int] = ()) -> dict[int, int]:
        """Tokens that followed a repeat of a text's end, with the length of the longest such repeat.

        Args:
            slot: of the text.
            after: tokens that it is taken to go on with, such as drafts.
        """
        tokens, found, lengths = array("i", after), (_INT * MAX_REPEATS)(), (_INT * MAX_REPEATS)()
        count = self._library.evo_texts_find(self.handle, slot, _at(tokens), len(tokens), found, lengths)
        return dict(zip(found[:count], lengths[:count], strict=True))


@dataclass(frozen=True)
class SessionCounts:
    """How a session's vocabulary has fared."""

    verified: int
    """Tokens of steps in which it was drafted for."""
    covered: int
    """Of them, those that could have been drafted."""
    events: int
    """Steps with a token that could not."""
    insertions: dict[str, int]
    hits: dict[str, int]
    """Accepted tokens outside the core, by what had named them."""
    num_read: int
    """Tokens generated."""
    num_counted: int
    """Tokens in the n-grams."""
    num_lessons: int
    """Positions from which the prior has learned."""


class Sessions:
    """What running sequences know of their texts: n-grams, tails of their draft vocabularies, weights of their priors.

    Every call that changes tails returns the places that changed. Those that take tokens raise ``IndexError`` where one
    is not of the vocabulary.

    Args:
        options: of all sessions.
        in_core: [vocab] bool, the tokens that all can draft.
        graph: what follows what in general text; None: nothing is known.
    """

    def __init__(self, options: SessionOptions, in_core: NDArray[np.bool_], graph: GraphArrays | None = None) -> None:
        self._library, self.options, self.vocab_size = load(), options, len(in_core)
        uses = [float(use) for use in options.uses]
        uses[3] *= graph is not None
        self._uses = np.array(uses, np.float32)
        core = np.ascontiguousarray(in_core, np.uint8)
        self._graph = graph  # whose arrays are used
        of_graph = _Graph()
        if graph is not None:
            arrays = graph.offsets, graph.token_ids, graph.log_probs
            of_graph = _Graph(*(one.ctypes.data for one in arrays), graph.width, graph.scale)
        sizes = options.sizes
        made = _Options(
            *(options.num_sessions, self.vocab_size, options.num_places),
            *(sizes.bigram_rows, sizes.bigram_width, sizes.trigram_rows, sizes.trigram_width),
            *(options.num_tenants, options.tenant_rows, options.tenant_width),
            *(options.only_recency, options.in_context, options.learns),
            (_FLOAT * NUM_FEATURES)(*uses),
            *(options.learning_rate, options.most_weight, options.gain_memory),
            *(2.0 ** (1.0 / options.half_life), options.presence),
            core.ctypes.data,
            of_graph,
        )
        self.handle = _POINTER(self._library.evo_sessions_new(ctypes.byref(made)))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.evo_sessions_free(self.handle)

    @property
    def num_bytes(self) -> int:
        """Memory of a session."""
        return int(self._library.evo_sessions_bytes(self.handle))

    def clear(self, session: int, weights: Sequence[float]) -> None:
        """A session begins, with these weights [NUM_FEATURES] of its prior, and nothing else."""
        self._library.evo_sessions_clear(self.handle, session, (_FLOAT * NUM_FEATURES)(*weights))

    def begin(self, session: int, prompt: Sequence[int], past: Sequence[int], of_tenant: Sequence[int]) -> TailWrites:
        """A sequence begins: count its prompt, and fill its tail with the prompt's own tokens, then others.

        Args:
            session: cleared, and maybe restored.
            prompt: all its tokens.
            past: of the tail with which the session's last sequence ended.
            of_tenant: what else its tenant's sessions had in theirs.
        """
        tokens, sizes = array("i", chain(prompt, past, of_tenant)), array("i", map(len, (prompt, past, of_tenant)))
        self._check(tokens)
        self._library.evo_sessions_begin(self.handle, session, _at(tokens), _at(sizes))
        return self._writes()

    def insert(self, session: int, token_ids: Iterable[int], source: str, limit: int | None = None) -> TailWrites:
        """Put tokens into a tail, the most wanted first; at most ``limit`` new ones (None: as there is room)."""
        tokens, most = array("i", token_ids), -1 if limit is None else limit
        self._check(tokens)
        number = SOURCES.index(source)
        self._library.evo_sessions_insert(self.handle, session, _at(tokens), len(tokens), number, most)
        return self._writes()

    def catch_up(
        self, sessions: Sequence[int], tenants: Sequence[int] | None, tokens: Sequence[Sequence[int]]
    ) -> TailWrites:
        """Take tokens of steps in which sequences were not drafted for."""
        arrays, rows = self._token_rows(sessions, tenants, tokens)
        self._library.evo_sessions_catch_up(self.handle, ctypes.byref(rows))
        del arrays
        return self._writes()

    def verify(
        self,
        sessions: Sequence[int],
        tenants: Sequence[int] | None,
        tokens: Sequence[Sequence[int]],
        num_accepted: Sequence[int],
        places: Sequence[Sequence[int]],
        drafted: Drafted | None,
    ) -> tuple[TailWrites, list[int]]:
        """Learn from a verified step.

        Args:
            sessions: those that got tokens.
            tenants: tables of their tenants; None without.
            tokens: of each.
            num_accepted: how many of them were drafted.
            places: of the drafts of each that were looked at, as rows of ``drafted``; none without.
            drafted: what they were chosen from.

        Returns:
            The writes, and the first token of each session that could not have been drafted, -1 for none.
        """
        arrays, rows = self._token_rows(sessions, tenants, tokens)
        of_rows = (
            array("i", num_accepted),
            array("i", map(len, places)),
            array("i", chain.from_iterable(places)),
        )
        of_drafted = (None, None, None, 0)
        if drafted is not None:
            begins = (one.ctypes.data for one in (drafted.token_ids, drafted.logits, drafted.features))
            of_drafted = (*begins, drafted.token_ids.shape[-1])
        missed = _zeros(len(sessions))
        how = _DraftedRows(*(values.buffer_info()[0] for values in of_rows), *of_drafted)
        self._library.evo_sessions_verify(self.handle, ctypes.byref(rows), ctypes.byref(how), _at(missed))
        del arrays
        return self._writes(), missed.tolist()

    def retrieve(
        self,
        sessions: Sequence[int],
        tenants: Sequence[int] | None,
        tokens: Sequence[Sequence[int]],
        likely: NDArray[np.int32] | None,
    ) -> TailWrites:
        """Put into tails what the target thought likely in the step just verified, and what follows that.

        Args:
            sessions, tenants, tokens: some of those that were verified.
            likely: [n, k] the target's most likely tokens where all these ``tokens`` were chosen, best first.
        """
        arrays, rows = self._token_rows(sessions, tenants, tokens)
        best = _NOTHING if likely is None else np.ascontiguousarray(likely, np.int32)
        place = _POINTER(best.ctypes.data)
        self._library.evo_sessions_retrieve(self.handle, ctypes.byref(rows), place, best.shape[1])
        del arrays
        return self._writes()

    def clear_tenant(self, tenant: int) -> None:
        """A tenant's table begins."""
        self._library.evo_sessions_clear_tenant(self.handle, tenant)

    def include_repeats(self, texts: Texts, step: DraftStep, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Make what continues a repeat of a row's text one of its candidates; the weakest make room, in place.

        Args:
            texts: of all rows.
            step: the rows.
            token_ids: [B, C], -1 for none.

        Returns:
            [n, 2]: rows and columns of candidates whose logits are to be computed.
        """
        included = np.empty((len(token_ids) * MAX_REPEATS, 2), np.int32)
        step.struct.tokens, step.struct.columns = token_ids.ctypes.data, token_ids.shape[1]
        count = self._library.evo_sessions_include(
            self.handle, texts.handle, ctypes.byref(step.struct), _POINTER(included.ctypes.data)
        )
        return included[:count]

    def score(self, step: DraftStep, drafted: Drafted) -> NDArray[np.float32]:
        """[B, C]: the candidates' logits with each session's prior.

        Args:
            step: the rows; ``include_repeats`` was asked about them.
            drafted: B rows; the features are written here.
        """
        scores = np.empty_like(drafted.logits)
        step.struct.tokens, step.struct.logits = drafted.token_ids.ctypes.data, drafted.logits.ctypes.data
        step.struct.features, step.struct.scores = drafted.features.ctypes.data, scores.ctypes.data
        self._library.evo_sessions_score(self.handle, ctypes.byref(step.struct))
        return scores

    def tail(self, session: int) -> list[int]:
        """The tokens of a tail, the most worth keeping first."""
        tokens = (_INT * max(self.options.num_places, 1))()
        return tokens[: self._library.evo_sessions_tail(self.handle, session, tokens)]

    def counts(self, session: int) -> SessionCounts:
        """How a session has fared since it began."""
        counts = self._library.evo_sessions_counts(self.handle, session).contents
        insertions, hits = (
            {name: count for name, count in zip(SOURCES, of_sources, strict=True) if count}
            for of_sources in (counts.insertions, counts.hits)
        )
        return SessionCounts(
            verified=counts.verified,
            covered=counts.covered,
            events=counts.events,
            insertions=insertions,
            hits=hits,
            num_read=counts.num_read,
            num_counted=counts.num_counted,
            num_lessons=counts.num_lessons,
        )

    def weights(self, session: int) -> NDArray[np.float32]:
        """[NUM_FEATURES] of a session's prior, as learned so far."""
        return _view(self._library.evo_sessions_weights(self.handle, session), np.float32, NUM_FEATURES)

    def applied_weights(self, session: int) -> NDArray[np.float32]:
        """[NUM_FEATURES]: what each feature weighs in a session's next drafts; 0 while the prior costs agreement."""
        gain = self._library.evo_sessions_state(self.handle, session).contents.gain
        applied: NDArray[np.float32] = self.weights(session) * self._uses * np.float32(gain >= 0.0)
        return applied

    def unit(self, session: int) -> float:
        """What one occurrence adds to a session's counts now."""
        return float(self._library.evo_sessions_state(self.handle, session).contents.unit)

    def unigrams(self, session: int) -> NDArray[np.float32]:
        """[vocab]: a session's counts of single tokens, in units."""
        return _view(self._library.evo_sessions_unigrams(self.handle, session), np.float32, self.vocab_size)

    def table(self, session: int, order: int) -> Table:
        """A session's counts of pairs (order 2) or triples (3), in units."""
        sizes = self.options.sizes
        rows = sizes.bigram_rows if order == 2 else sizes.trigram_rows
        table = self._library.evo_sessions_ngrams(self.handle, session, order)
        return Table(
            _view(table.keys, np.int64, rows),
            _view(table.tokens, np.int32, rows, table.width),
            _view(table.counts, np.float32, rows, table.width),
            table.shift,
        )

    def followers(self, session: int, order: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """What followed a session's last token (order 2) or last two (3), -1 for none, and log(1 + count) of each."""
        sizes = self.options.sizes
        width = sizes.bigram_width if order == 2 else sizes.trigram_width
        tokens, values = np.empty(width, np.int32), np.empty(width, np.float32)
        places = (_POINTER(one.ctypes.data) for one in (tokens, values))
        self._library.evo_sessions_followers(self.handle, session, order, *places)
        return tokens, values

    def go_on(self, session: int, num_read: int, num_counted: int) -> None:
        """A session goes on in which so many tokens were generated, and whose n-grams are of so many."""
        counts = self._library.evo_sessions_counts(self.handle, session).contents
        counts.num_read, counts.num_counted = num_read, num_counted

    def _check(self, tokens: array[int]) -> None:
        if not self._library.evo_sessions_know(self.handle, _at(tokens), len(tokens)):
            raise IndexError(f"not all tokens are below {self.vocab_size}")

    def _token_rows(
        self, sessions: Sequence[int], tenants: Sequence[int] | None, tokens: Sequence[Sequence[int]]
    ) -> tuple[list[array[int]], _TokenRows]:
        """The rows, and the arrays that must outlive them. (Python's own: a small one costs a fraction of NumPy's.)"""
        begins, joined = _joined(tokens)
        self._check(joined)
        arrays = [array("i", sessions), begins, joined]
        of_tenants = None
        if tenants is not None:
            arrays.append(array("i", tenants))
            of_tenants = arrays[-1].buffer_info()[0]
        own, begin, token = (values.buffer_info()[0] for values in arrays[:3])
        return arrays, _TokenRows(len(sessions), own, of_tenants, begin, token)

    def _writes(self) -> TailWrites:
        count = ctypes.c_int()
        place = self._library.evo_sessions_take_writes(self.handle, ctypes.byref(count))
        return _view(place, np.int32, count.value, 3).copy() if count.value else _NO_WRITES


TailWrites = NDArray[np.int32]
"""[n, 3]: sessions, places of their tails, and the tokens that are there now."""
_NOTHING: NDArray[np.int32] = np.empty((0, 0), np.int32)
_NO_WRITES: TailWrites = np.empty((0, 3), np.int32)


class DraftStep:
    """Rows of a batch whose next draft token is chosen.

    Args:
        sessions: of each row; -1 for none.
        texts: of each row; -1 for none.
        drafts: tokens drafted before in this step, as many for each row.
    """

    def __init__(self, sessions: Sequence[int], texts: Sequence[int], drafts: Sequence[Sequence[int]]) -> None:
        count = len(sessions)
        self._arrays = array("i", sessions), array("i", texts), array("i", chain.from_iterable(drafts))
        self._found = [_zeros(count * size) for size in (MAX_REPEATS, MAX_REPEATS, 1)]
        self.struct = _DraftStep(count, 0, len(drafts[0]))
        fields = zip(("sessions", "texts", "drafts"), self._arrays, strict=True)
        found = zip(("matched", "lengths", "num_matched"), self._found, strict=True)
        for name, values in chain(fields, found):
            setattr(self.struct, name, values.buffer_info()[0])


def _joined(tokens: Sequence[Sequence[int]]) -> tuple[array[int], array[int]]:
    """Where each row's tokens begin, and all of them."""
    return array("i", accumulate(map(len, tokens), initial=0)), array("i", chain.from_iterable(tokens))


def _zeros(count: int) -> array[int]:
    return array("i", bytes(4 * count))


def _at(values: array[int]) -> ctypes.c_void_p:
    return _POINTER(values.buffer_info()[0])


def _view(place: int, dtype: Any, *shape: int) -> NDArray[Any]:
    """Memory of the library as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_char * size).from_address(place)
    return np.frombuffer(buffer, dtype).reshape(shape)
