"""ctypes binding of the compiled chains of draft tokens (kernels/csrc/draft_chain.cpp)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.draft_head import TailSlabs
from kernels.native import MatrixStruct, PackedMatrix, Team, address, load_library
from kernels.native_decoder import Decoder, KvCache
from kernels.native_lora import NativeLora
from kernels.native_prior import NUM_FEATURES, ChainPrior, PriorKernel
from kernels.native_sampling import TailSlabsStruct


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layer", "norm")),
        ("hidden", ctypes.c_int),
        *((name, MatrixStruct) for name in ("embedding", "head", "core")),
        *((name, ctypes.c_void_p) for name in ("core_ids", "tails", "graph", "used")),
        ("ways", ctypes.c_int),
        ("presence_floor", ctypes.c_double),
        ("kv", ctypes.c_void_p),
    )


_ROW_POINTERS = (
    *("lengths", "positions", "block_tables", "slabs", "lora"),
    *("temperatures", "seeds", "top_k", "top_p", "min_p"),
    *("sessions", "units", "weights", "contexts", "texts"),
)


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("rows", "max_length", "max_blocks", "candidates")),
        *((name, ctypes.c_void_p) for name in _ROW_POINTERS),
    )


class _Outputs(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("tokens", "hidden", "token_ids", "logits", "features"))


@dataclass(frozen=True)
class ChainSampling:
    """How the tokens of B chains are chosen, one entry a row; as in ``engine.messages.SamplingParams``."""

    temperatures: Sequence[float]
    """0: greedy"""
    seeds: Sequence[int]
    """as signed 64 bits"""
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]


@dataclass(frozen=True)
class ChainBatch:
    """B sequences, the longest chain first."""

    lengths: Sequence[int]
    """Draft tokens of each; at least 1"""
    positions: Sequence[int]
    """Of the last known token"""
    block_tables: NDArray[np.int32]
    """[B, max_blocks]"""
    slabs: Sequence[int] | None = None
    """The tail of each, where there are tails"""
    sampling: ChainSampling | None = None
    """None: all greedy"""
    prior: ChainPrior | None = None
    lora: NativeLora | None = None


@dataclass(frozen=True)
class ChainResult:
    """Steps S and rows B; what is beyond the end of a chain is undefined."""

    tokens: NDArray[np.int32]
    """[S, B]"""
    hidden: torch.Tensor
    """[S, B, hidden] bf16, from which each token was chosen"""
    token_ids: NDArray[np.int32]
    """[S, B, C] candidates, -1 for none"""
    logits: NDArray[np.float32]
    """[S, B, C] the draft's own, -inf for none"""
    features: NDArray[np.float32] | None
    """[S, B, C, NUM_FEATURES], with a prior"""


class NativeChain:
    """A draft whose chains run in one call.

    Args:
        team: its threads.
        layer: the draft's layer.
        norm: its output norm, float32 [hidden].
        embedding: the target's.
        head: the target's.
        core: rows of the head that all sequences share.
        core_ids: [K] int32, the tokens of these rows; None: all.
        tails: of the sequences; None: none.
        prior: None: none.
        candidates: of each token that are looked at, where not only the best one counts.
    """

    def __init__(
        self,
        team: Team,
        layer: Decoder,
        norm: torch.Tensor,
        embedding: PackedMatrix,
        head: PackedMatrix,
        core: PackedMatrix,
        core_ids: torch.Tensor | None,
        tails: TailSlabs | None,
        prior: PriorKernel | None,
        candidates: int,
    ) -> None:
        self._team, self._layer, self._norm = team, layer, norm
        self._embedding, self._head = embedding, head
        self._core, self._core_ids, self._tails, self._prior = core, core_ids, tails, prior
        self._candidates = min(candidates, core.n + (0 if tails is None else tails.slots))
        self._tails_struct: TailSlabsStruct | None = None
        if tails is not None:
            self._tails_struct = TailSlabsStruct(
                tails.rows.data_ptr(), tails.token_ids.data_ptr(), *tails.rows.shape[1:]
            )

    def run(self, batch: ChainBatch, a: torch.Tensor, cache: KvCache) -> ChainResult:
        """Draft.

        Args:
            batch: the sequences.
            a: [B, hidden] float32, the draft's state after each one's last known token; overwritten.
            cache: the draft's keys and values; the last token of each chain gets none.
        """
        num_rows, steps, hidden = len(batch.lengths), batch.lengths[0], a.shape[1]
        count = 1 if batch.sampling is None and batch.prior is None else self._candidates
        shape = steps, num_rows
        result = ChainResult(
            np.empty(shape, np.int32),
            torch.empty(*shape, hidden, dtype=torch.bfloat16),
            np.empty((*shape, count), np.int32),
            np.empty((*shape, count), np.float32),
            None if batch.prior is None else np.empty((*shape, count, NUM_FEATURES), np.float32),
        )
        arrays = _arrays(batch)
        tables = np.ascontiguousarray(batch.block_tables, np.int32)
        rows = _Rows(num_rows, steps, tables.shape[1], count, block_tables=tables.ctypes.data)
        for name, values in arrays.items():
            setattr(rows, name, values.buffer_info()[0])
        if batch.lora is not None:
            rows.lora = ctypes.cast(batch.lora.pointer, ctypes.c_void_p)
        outputs = _Outputs(
            result.tokens.ctypes.data,
            result.hidden.data_ptr(),
            result.token_ids.ctypes.data,
            result.logits.ctypes.data,
            None if result.features is None else result.features.ctypes.data,
        )
        model = self._model(hidden, cache)
        load_library().evo_draft_chain(
            self._team.handle, ctypes.byref(model), ctypes.byref(rows), address(a), ctypes.byref(outputs)
        )
        return result

    def _model(self, hidden: int, cache: KvCache) -> _Model:
        prior, tails = self._prior, self._tails_struct
        return _Model(
            *(self._layer.handle, address(self._norm), hidden),
            *(matrix.struct for matrix in (self._embedding, self._head, self._core)),
            address(self._core_ids),
            None if tails is None else ctypes.addressof(tails),
            *((None, None, 0, 0.0) if prior is None else prior.addresses),
            ctypes.addressof(cache.struct),
        )


def _arrays(batch: ChainBatch) -> dict[str, array[Any]]:
    """The rows' arrays by name; they must outlive the call. (Python's own: a small one costs a fraction of NumPy's.)"""
    arrays: dict[str, array[Any]] = {"lengths": array("i", batch.lengths), "positions": array("i", batch.positions)}
    if batch.slabs is not None:
        arrays["slabs"] = array("i", batch.slabs)
    if (sampling := batch.sampling) is not None:
        arrays["temperatures"], arrays["seeds"] = array("f", sampling.temperatures), array("q", sampling.seeds)
        arrays["top_k"], arrays["top_p"] = array("i", sampling.top_k), array("d", sampling.top_p)
        arrays["min_p"] = array("d", sampling.min_p)
    if (prior := batch.prior) is not None:
        arrays["sessions"], arrays["weights"] = array("Q", prior.sessions), array("Q", prior.weights)
        arrays["units"], arrays["contexts"] = array("d", prior.units), array("q", chain.from_iterable(prior.contexts))
        if prior.texts is not None:
            arrays["texts"] = array("Q", prior.texts)
    return arrays
