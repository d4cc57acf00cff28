"""ctypes bindings of the compiled prior (kernels/csrc/prior.cpp): for batches of draft steps and of verified positions.

The specification is in plain numpy, engine/vocab/prior.py. Arrays are numpy's, contiguous. The library is loaded when
it is wanted, so that importing this imports no torch: the server reads snapshots with code that stands on it.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_FEATURES = 5


class _Table(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "token_ids", "counts")),
        *((name, ctypes.c_int32) for name in ("shift", "width")),
    )


class _Session(ctypes.Structure):
    _fields_ = (("unigrams", ctypes.c_void_p), ("bigrams", _Table), ("trigrams", _Table))


class _Graph(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offsets", "token_ids", "log_probs")),
        ("width", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


_ROW_POINTERS = (
    *("sessions", "units", "contexts", "weights", "match_ids", "match_values"),
    *("token_ids", "logits", "used"),
)


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _ROW_POINTERS),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "matches", "ways")),
        ("presence_floor", ctypes.c_double),
    )


class _Lessons(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "logits", "features", "weights", "targets")),
        *((name, ctypes.c_int32) for name in ("count", "columns")),
        *((name, ctypes.c_float) for name in ("rate", "highest", "repeat_bonus")),
    )


@functools.cache
def is_available() -> bool:
    """Whether the library can be used here."""
    from kernels.native import unsupported_reason

    return unsupported_reason() is None


class TableView:
    """Arrays of a table of contexts: keys [R], token ids [R, W] and counts [R, W]; ``shift`` of the keys' hash."""

    def __init__(
        self, keys: NDArray[np.int64], token_ids: NDArray[np.int32], counts: NDArray[np.float32], shift: int
    ) -> None:
        self.arrays = keys, token_ids, counts
        self.table = _Table(*(array.ctypes.data for array in self.arrays), shift, token_ids.shape[1])


class SessionView:
    """Where a session's counts are; it keeps the arrays, which must not be replaced.

    Args:
        unigrams: [vocab].
        bigrams: by the last token.
        trigrams: by the last two.
    """

    def __init__(self, unigrams: NDArray[np.float32], bigrams: TableView, trigrams: TableView) -> None:
        self._arrays = unigrams, bigrams, trigrams
        self._session = _Session(unigrams.ctypes.data, bigrams.table, trigrams.table)
        self.address = ctypes.addressof(self._session)
        """For ``PriorKernel.scores``."""
        self._vocab_size = len(unigrams)

    def observe(
        self, token_ids: Sequence[int], two_ago: int, one_ago: int, growth: float, unit: float, ways: int
    ) -> float:
        """Count a run of tokens; returns what the last one was worth.

        Args:
            token_ids: in order.
            two_ago, one_ago: the tokens before them, -1 for none.
            growth: each is worth so many times the one before it.
            unit: what the one before was worth.
            ways: rows in which a context can live.

        Raises:
            IndexError: a token is not of the vocabulary.
        """
        from kernels.native import load_library

        tokens = array("i", token_ids)
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            raise IndexError(f"not all of {token_ids} are below {self._vocab_size}")
        library: Any = load_library()
        before = ctypes.c_int64(two_ago), ctypes.c_int64(one_ago)
        worth = ctypes.c_double(growth), ctypes.c_double(unit)
        begin = ctypes.c_void_p(tokens.buffer_info()[0])
        result: float = library.evo_observe_ngrams(
            ctypes.c_void_p(self.address), begin, len(tokens), *before, *worth, ways
        )
        return result


@dataclass(frozen=True)
class ChainPrior:
    """The prior of B chains, one entry a row. Addresses are of what is here and in ``kernels.native_text``."""

    sessions: Sequence[int]
    """Of ``SessionView``; 0: no prior for this row"""
    units: Sequence[float]
    """What one occurrence is worth in each session"""
    weights: Sequence[int]
    """Of [NUM_FEATURES] float32"""
    repeat_bonuses: Sequence[float]
    """Of the candidate that continues the longest repeat, where that is long"""
    contexts: Sequence[tuple[int, int]]
    """The last two tokens, -1 for none"""
    texts: Sequence[int] | None
    """Of ``NativeTextIndex``; None: repeats do not count"""


class PriorKernel:
    """The prior over one graph.

    Args:
        graph: offsets [vocab + 1] int64, token ids and log-probabilities of edges; None without.
        width: followers of a token that count.
        scale: the value of a follower is 1 + its log-probability times this.
        used: [NUM_FEATURES]: 1 for the features that count, else 0.
        ways: rows in which a context can live.
        presence_floor: counts below this many occurrences are no presence.
    """

    def __init__(
        self,
        graph: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]] | None,
        width: int,
        scale: float,
        used: NDArray[np.float32],
        ways: int,
        presence_floor: float,
    ) -> None:
        self._arrays, self._used = graph, used
        addresses = (None, None, None) if graph is None else [array.ctypes.data for array in graph]
        self._graph = _Graph(*addresses, width, scale)
        self._ways, self._presence_floor = ways, presence_floor
        from kernels.native import load_library

        self._library: Any = load_library()

    @property
    def addresses(self) -> tuple[int, int, int, float]:
        """Graph, used features, ways and presence floor, for ``kernels.native_chain``."""
        return ctypes.addressof(self._graph), int(self._used.ctypes.data), self._ways, self._presence_floor

    def scores(
        self,
        sessions: Sequence[int],
        units: Sequence[float],
        contexts: Sequence[tuple[int, int]],
        weights: NDArray[np.float32],
        matches: tuple[NDArray[np.int32], NDArray[np.float32]],
        token_ids: NDArray[np.int32],
        logits: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features [B, C, NUM_FEATURES] and scores [B, C] of candidates.

        Args:
            sessions: addresses of ``SessionView``, one a row.
            units: what one occurrence is worth in each session.
            contexts: the last two tokens of each row, -1 for none.
            weights: [B, NUM_FEATURES].
            matches: token ids [B, M], -1 for none, and their values.
            token_ids: [B, C], -1 for none.
            logits: [B, C], -inf for none.
        """
        rows, columns = token_ids.shape
        arrays = (
            *(np.array(sessions, np.uint64), np.array(units), np.array(contexts, np.int64), weights),
            *(*matches, token_ids, logits, self._used),
        )
        how = _Rows(
            *(a.ctypes.data for a in arrays), rows, columns, matches[0].shape[1], self._ways, self._presence_floor
        )
        features, scores = np.empty((rows, columns, NUM_FEATURES), np.float32), np.empty((rows, columns), np.float32)
        self._library.evo_prior_scores(
            *(ctypes.byref(how), ctypes.byref(self._graph)),
            *(ctypes.c_void_p(out.ctypes.data) for out in (features, scores)),
        )
        return features, scores

    def learn(
        self,
        candidates: Sequence[tuple[int, int, int]],
        columns: int,
        weights: Sequence[int],
        targets: Sequence[int],
        rate: float,
        highest: float,
        repeat_bonus: float,
    ) -> tuple[list[int], list[int]]:
        """Move weights by a step of gradient ascent for each of N positions, all gradients taken before.

        Args:
            candidates: addresses of token ids [C], logits [C] and features [C, NUM_FEATURES], one position each.
            columns: C.
            weights: addresses of [NUM_FEATURES] float32; the same may come more than once.
            targets: [N].
            rate: of the step.
            highest: weights stay within 0 and this.
            repeat_bonus: of the candidate that continues the longest repeat, where that is long.

        Returns:
            For each position 1 where only the prior's first choice is the target, -1 where only the draft's, else 0;
            and the same of the prior with and without that bonus.
        """
        # Python's own arrays: a small one costs a fraction of NumPy's.
        pointers = [array("Q", addresses) for addresses in (*zip(*candidates, strict=True), weights)]
        wanted, advantages, of_repeats = (array("i", targets) for _ in range(3))
        places = [values.buffer_info()[0] for values in (*pointers, wanted)]
        how = _Lessons(*places, len(targets), columns, rate, highest, repeat_bonus)
        outputs = (ctypes.c_void_p(out.buffer_info()[0]) for out in (advantages, of_repeats))
        self._library.evo_prior_learn(ctypes.byref(how), *outputs)
        return advantages.tolist(), of_repeats.tolist()
