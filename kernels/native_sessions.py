"""ctypes binding of sessions (kernels/csrc/sessions): one call for a batch, however many sequences it has."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import (
    FLOAT,
    INT,
    POINTER,
    DraftStep,
    GraphStruct,
    LessonStruct,
    OptionsStruct,
    ScoredStruct,
    SessionCounts,
    StateStruct,
    TokenRows,
    address_of,
    load,
    view_of,
    zeros,
)
from evospec.kernels.session_options import (
    NUM_FEATURES,
    SOURCES,
    GraphArrays,
    SessionOptions,
    Table,
    drafted_ints,
)

if TYPE_CHECKING:
    import torch

LogitsOf = Callable[[NDArray[np.int32], NDArray[np.int32]], "torch.Tensor"]
"""The draft's logits [n] float32 on the CPU, at some rows [n] of any tokens [n]."""
TailWrites = NDArray[np.int32]
"""[n, 3]: sessions, places of their tails, and the tokens that are there now."""
_NOTHING: NDArray[np.int32] = np.empty((0, 0), np.int32)
_NO_WRITES: TailWrites = np.empty((0, 3), np.int32)


class Sessions:
    """What running sequences know of their texts: n-grams, tails of their draft vocabularies, weights of their priors.

    Calls that change tails return the places that changed; what ``learn`` changes, a later one does. Those that take
    tokens raise ``IndexError`` where one is not of the vocabulary.

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
        self.graph = graph  # whose arrays are used
        of_graph = GraphStruct()
        if graph is not None:
            arrays = graph.offsets, graph.token_ids, graph.log_probs
            of_graph = GraphStruct(*(one.ctypes.data for one in arrays), graph.width, graph.scale)
        sizes = options.sizes
        made = OptionsStruct(
            *(options.num_sessions, self.vocab_size, options.num_places),
            *(sizes.bigram_rows, sizes.bigram_width, sizes.trigram_rows, sizes.trigram_width),
            *(options.num_tenants, options.tenant_rows, options.tenant_width),
            *(options.only_recency, options.in_context, options.learns),
            (FLOAT * NUM_FEATURES)(*uses),
            *(options.learning_rate, options.most_weight, options.gain_memory),
            *(2.0 ** (1.0 / options.half_life), options.presence),
            core.ctypes.data,
            of_graph,
        )
        self.handle = POINTER(self._library.evo_sessions_new(ctypes.byref(made)))
        weakref.finalize(self, self._library.evo_sessions_free, self.handle).atexit = False
        count, first_state = options.num_sessions, ctypes.addressof(self.state(0))
        self._weights = view_of(self._library.evo_sessions_weights(self.handle, 0), np.float32, count, NUM_FEATURES)
        self._gains = view_of(first_state, np.dtype(StateStruct), count)["gain"]

    @property
    def num_bytes(self) -> int:
        """Memory of a session."""
        return int(self._library.evo_sessions_bytes(self.handle))

    def clear(self, session: int, weights: Sequence[float]) -> None:
        """A session begins, with these weights [NUM_FEATURES] of its prior, and nothing else."""
        self._library.evo_sessions_clear(self.handle, session, (FLOAT * NUM_FEATURES)(*weights))

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
        self._library.evo_sessions_begin(self.handle, session, address_of(tokens), address_of(sizes))
        return self.take_writes()

    def insert(self, session: int, token_ids: Iterable[int], source: str, limit: int | None = None) -> TailWrites:
        """Put tokens into a tail, the most wanted first; at most ``limit`` new ones (None: as there is room)."""
        tokens, most = array("i", token_ids), -1 if limit is None else limit
        self._check(tokens)
        number = SOURCES.index(source)
        self._library.evo_sessions_insert(self.handle, session, address_of(tokens), len(tokens), number, most)
        return self.take_writes()

    def catch_up(self, rows: TokenRows) -> TailWrites:
        """Take tokens of steps in which sequences were not drafted for."""
        self._must_know(self._library.evo_sessions_catch_up(self.handle, ctypes.byref(rows.struct)))
        return self.take_writes()

    def missed(self, rows: TokenRows, texts: Texts) -> list[int]:
        """The first token of each row of a verified step that could not have been drafted, -1 for none.

        Of the rows that name a text of ``texts``, this goes on with the tokens.
        """
        missed, struct = zeros(len(rows)), ctypes.byref(rows.struct)
        self._must_know(self._library.evo_sessions_missed(self.handle, texts.handle, struct, address_of(missed)))
        return missed.tolist()

    def learn(
        self,
        rows: TokenRows,
        chosen: Sequence[int] = (),
        likely: NDArray[np.int32] | None = None,
        *,
        in_background: bool = False,
    ) -> None:
        """Learn from a verified step, and put into tails what is likely to come; ``take_writes`` says what that was.

        Args:
            rows: the sessions that got tokens, of which ``missed`` was asked about.
            chosen: rows into whose tails enters what the target thought likely, and what follows that; ascending.
            likely: [n, k] the target's most likely tokens where the tokens of the chosen rows were chosen, best first.
            in_background: on another thread; the next call that wants to know waits for it.
        """
        lesson = LessonStruct(rows.struct)
        if chosen:
            best = _NOTHING if likely is None else np.ascontiguousarray(likely, np.int32)
            of_chosen = array("i", chosen)
            lesson.chosen, lesson.likely = of_chosen.buffer_info()[0], best.ctypes.data
            lesson.num_chosen, lesson.k = len(chosen), best.shape[1]
            self._likely = of_chosen, best  # they and the rows must outlive it
        self._learned = rows
        self._library.evo_sessions_learn(self.handle, ctypes.byref(lesson), in_background)

    def take_writes(self) -> TailWrites:
        """The places of tails that changed since the last call that told."""
        return self._writes_of(self._library.evo_sessions_take_writes)

    def begin_drafts(self) -> TailWrites:
        """Another step's drafts begin, those of the last one are forgotten; as ``take_writes``."""
        return self._writes_of(self._library.evo_sessions_begin_drafts)

    def _writes_of(self, call: Any) -> TailWrites:
        count = ctypes.c_int()
        place = call(self.handle, ctypes.byref(count))
        if not count.value:
            return _NO_WRITES
        # A copy of bytes: a type of ctypes for each number of writes would take longer than all of them.
        return np.frombuffer(ctypes.string_at(place, 12 * count.value), np.int32).reshape(-1, 3)

    def clear_tenant(self, tenant: int) -> None:
        """A tenant's table begins."""
        self._library.evo_sessions_clear_tenant(self.handle, tenant)

    def score(self, texts: Texts, step: DraftStep, logits_of: LogitsOf) -> None:
        """Add each session's prior to the candidates' logits, in place. What they were is remembered until ``learn``.

        Before that, what continues a repeat of a row's text becomes one of its candidates; the weakest make room.

        Args:
            texts: of all rows.
            step: the rows, and their candidates.
            logits_of: for the tokens that become candidates; where it is NaN, that of the one that made room stays.
        """
        if self._library.evo_sessions_include(self.handle, texts.handle, step.pointer):
            logits = logits_of(*step.included())
            self._library.evo_sessions_score(self.handle, step.pointer, POINTER(logits.data_ptr()))

    def take_drafts(self, block: torch.Tensor, columns: int, sessions: Sequence[int], lengths: Sequence[int]) -> None:
        """Drafts that a GPU has scored, in place of ``score``.

        Args:
            block: that of ``DraftedRounds``, on the CPU.
            columns: candidates of each draft.
            sessions: of the first rows; -1 for none. No other row has one.
            lengths: drafts of each of these rows.
        """
        rounds, width = block.shape
        scored = ScoredStruct(rounds, width // drafted_ints(columns), columns, block.data_ptr())
        slots, drafts = array("i", sessions), array("i", lengths)
        self._library.evo_sessions_take_drafts(
            self.handle, ctypes.byref(scored), len(slots), address_of(slots), address_of(drafts)
        )

    def tail(self, session: int) -> list[int]:
        """The tokens of a tail, the most worth keeping first."""
        tokens = (INT * max(self.options.num_places, 1))()
        return tokens[: self._library.evo_sessions_tail(self.handle, session, tokens)]

    def counts(self, session: int) -> SessionCounts:
        """How a session has fared since it began: what is written there counts."""
        counts: SessionCounts = self._library.evo_sessions_counts(self.handle, session).contents
        return counts

    def weights(self, session: int) -> NDArray[np.float32]:
        """[NUM_FEATURES] of a session's prior, as learned so far."""
        return view_of(self._library.evo_sessions_weights(self.handle, session), np.float32, NUM_FEATURES)

    def applied_weights(self, sessions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, NUM_FEATURES]: what features weigh in some sessions' next drafts; 0 while a prior costs agreement."""
        self.state(0)  # which waits until all is learned
        applied: NDArray[np.float32] = self._weights[sessions] * self._uses * (self._gains[sessions] >= 0.0)[:, None]
        return applied

    def state(self, session: int) -> StateStruct:
        """Where a session stands."""
        state: StateStruct = self._library.evo_sessions_state(self.handle, session).contents
        return state

    def unigrams(self, session: int) -> NDArray[np.float32]:
        """[vocab]: a session's counts of single tokens, in units."""
        return view_of(self._library.evo_sessions_unigrams(self.handle, session), np.float32, self.vocab_size)

    def table(self, session: int, order: int) -> Table:
        """A session's counts of pairs (order 2) or triples (3), in units."""
        sizes = self.options.sizes
        rows = sizes.bigram_rows if order == 2 else sizes.trigram_rows
        table = self._library.evo_sessions_ngrams(self.handle, session, order)
        return Table(
            view_of(table.keys, np.int64, rows),
            view_of(table.tokens, np.int32, rows, table.width),
            view_of(table.counts, np.float32, rows, table.width),
            table.shift,
        )

    def followers(self, session: int, order: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """What followed a session's last token (order 2) or last two (3), -1 for none, and log(1 + count) of each."""
        sizes = self.options.sizes
        width = sizes.bigram_width if order == 2 else sizes.trigram_width
        tokens, values = np.empty(width, np.int32), np.empty(width, np.float32)
        places = (POINTER(one.ctypes.data) for one in (tokens, values))
        self._library.evo_sessions_followers(self.handle, session, order, *places)
        return tokens, values

    def _check(self, tokens: array[int]) -> None:
        self._must_know(self._library.evo_sessions_know(self.handle, address_of(tokens), len(tokens)))

    def _must_know(self, all_known: int) -> None:
        if not all_known:
            raise IndexError(f"not all tokens are below {self.vocab_size}")
