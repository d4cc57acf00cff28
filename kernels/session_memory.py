"""What sessions and texts know, as a GPU reads it: where the host has it, some cache lines for each draft token.

So nothing is copied, and nothing is outdated. The memory is registered with the driver, which keeps its pages in place.
And what the GPU tells of its draft tokens.

NOT RUN on a GPU so far.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import StateStruct, view_of
from evospec.kernels.session_options import NUM_FEATURES
from evospec.kernels.upload import upload


@dataclass(frozen=True)
class TableMemory:
    """All sessions' tables of one order; see ``Table``."""

    keys: torch.Tensor
    """[sessions, rows] int64"""
    tokens: torch.Tensor
    """[sessions, rows, width] int32"""
    counts: torch.Tensor
    """[sessions, rows, width] float32"""
    shift: int

    @classmethod
    def of(cls, sessions: Sessions, order: int, device: torch.device) -> TableMemory:
        """Of order 2 or 3."""
        count, table = sessions.options.num_sessions, sessions.table(0, order)
        keys, tokens, counts = (
            _all_of(sessions, array.ctypes.data, array.dtype, device, count, *array.shape)
            for array in (table.keys, table.token_ids, table.counts)
        )
        return cls(keys, tokens, counts, table.shift)


@dataclass(frozen=True)
class SessionMemory:
    """All sessions."""

    states: torch.Tensor
    """[sessions, 5] float64: of ``StateStruct`` the unit, the gain, and what is not to be read as such"""
    last: torch.Tensor
    """[sessions, 2] int32, their last two tokens; of ``states``"""
    weights: torch.Tensor
    """[sessions, NUM_FEATURES] float32, of their priors"""
    unigrams: torch.Tensor
    """[sessions, vocab] float32"""
    pairs: TableMemory
    triples: TableMemory
    graph: list[torch.Tensor] | None
    """On the device: offsets [vocab + 1] int64, tokens int32 and their values float32; see ``GraphArrays``"""
    num_edges: int
    """Of a token that are looked at."""
    order: int
    """Most tokens in a row that count"""
    presence: float

    @classmethod
    def of(cls, sessions: Sessions, device: torch.device) -> SessionMemory:
        """As a device reads it, as long as the sessions are there."""
        options, graph = sessions.options, sessions.graph
        count, state = options.num_sessions, ctypes.addressof(sessions.state(0))
        states = _all_of(sessions, state, np.float64, device, count, ctypes.sizeof(StateStruct) // 8)
        first = StateStruct.last.offset // 4
        values = None
        if graph is not None:
            value = 1.0 + graph.log_probs * np.float32(graph.scale)
            values = upload(device, graph.offsets, graph.token_ids, value.astype(np.float32))
        return cls(
            states,
            states.view(torch.int32)[:, first : first + 2],
            _all_of(sessions, sessions.weights(0).ctypes.data, np.float32, device, count, NUM_FEATURES),
            _all_of(sessions, sessions.unigrams(0).ctypes.data, np.float32, device, count, sessions.vocab_size),
            TableMemory.of(sessions, 2, device),
            TableMemory.of(sessions, 3, device),
            values,
            0 if graph is None else graph.width,
            1 + sum(options.uses[1:3]),
            options.presence,
        )


@dataclass(frozen=True)
class TextMemory:
    """All texts; see text_index.h."""

    tokens: torch.Tensor
    """[texts, capacity] int32"""
    previous: torch.Tensor
    """[texts, capacity] int32"""
    latest: torch.Tensor
    """[texts, buckets] int32"""
    sizes: torch.Tensor
    """[texts] int32"""
    factor: int
    """Of the pairs' hashes, as a signed number."""

    @classmethod
    def of(cls, texts: Texts, device: torch.device) -> TextMemory:
        """As a device reads it, as long as the texts are there."""
        arrays = texts.arrays()
        shapes = (arrays.capacity,), (arrays.capacity,), (arrays.buckets,), ()
        places = arrays.tokens, arrays.previous, arrays.latest, arrays.size
        both = zip(places, shapes, strict=True)
        tokens, previous, latest, sizes = (
            _all_of(texts, place, np.int32, device, texts.num_slots, *shape) for place, shape in both
        )
        return cls(tokens, previous, latest, sizes, arrays.factor)


@dataclass(frozen=True)
class DraftedRounds:
    """Rounds of a chain, each of which chooses a token for every row; as ``ScoredRounds`` in draft_rounds.h.

    Attributes:
        block: [rounds, rows * ``drafted_ints(columns)``] int32.
        rows: of each round.
        columns: candidates of a row; 0: they are not kept.
    """

    block: torch.Tensor
    rows: int
    columns: int

    def chosen(self, place: int) -> torch.Tensor:
        """[rows] int32: the tokens of a round."""
        return self.block[place, : self.rows]

    def token_ids(self, place: int) -> torch.Tensor:
        """[rows, columns] int32, what they are chosen from."""
        return self._part(place, 0, 1).view(self.rows, -1)

    def logits(self, place: int) -> torch.Tensor:
        """[rows, columns] float32, the draft's."""
        return self._part(place, 1, 1).view(torch.float32).view(self.rows, -1)

    def features(self, place: int) -> torch.Tensor:
        """[rows, NUM_FEATURES, columns] float32."""
        return self._part(place, 2, NUM_FEATURES).view(torch.float32).view(self.rows, NUM_FEATURES, -1)

    def _part(self, place: int, first: int, count: int) -> torch.Tensor:
        size = self.rows * self.columns
        begin = self.rows + first * size
        return self.block[place, begin : begin + count * size]


def _all_of(owner: object, place: int, dtype: Any, device: torch.device, *shape: int) -> torch.Tensor:
    """Memory of the host from a page's begin on, for kernels of a device as long as its ``owner`` is there.

    Raises:
        RuntimeError: the driver does not take it.
    """
    memory = torch.from_numpy(view_of(place, dtype, *shape))
    if device.type == "cuda":
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failure = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(failure) != 0:
            reason = runtime.cudaGetErrorString(failure)
            raise RuntimeError(
                f"the GPU cannot read {memory.nbytes} bytes of main memory: {reason}; "
                "it need not with --no-engine.runtime.cuda_graphs"
            )
        # Of an object's finalizers the last comes first: so this one before that which frees the memory.
        weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory
