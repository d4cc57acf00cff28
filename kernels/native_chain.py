"""ctypes binding of the compiled chains of draft tokens (kernels/csrc/draft_chain.cpp)."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from evospec.kernels.batched_lora import LoraRows, NativeLora
from evospec.kernels.choose_tokens import RowSampling
from evospec.kernels.head_rows import TailSlabs
from evospec.kernels.native import MatrixStruct, PackedMatrix, Team, address, integers, load_library, pointers
from evospec.kernels.native_decoder import Decoder, KvCache
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts

CONFIDENCE_LEVELS = 16
"""Of how sure a draft is of a token: level n is a probability of n/16 to (n + 1)/16 among the candidates."""


class _Model(ctypes.Structure):
    _fields_ = (
        *pointers("layer", "norm"),
        *integers("hidden"),
        *((name, MatrixStruct) for name in ("embedding", "head", "core")),
        *pointers("core_ids", "row_of", "tails", "sessions", "texts", "kv"),
        *integers("shift", "norm_output"),
    )


class _Unread(ctypes.Structure):
    _fields_ = (
        *integers("tokens", "sequences"),
        *pointers("token_ids", "positions", "slots", "query_start", "seq_lens", "before", "g", "lora"),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *integers("rows", "max_length", "max_blocks", "candidates"),
        *pointers("lengths", "positions", "block_tables", "slabs", "lora"),
        *pointers("temperatures", "seeds", "top_k", "top_p", "min_p"),
        *pointers("sessions", "texts"),
        *pointers("chances", "tenants", "acceptance", "verify_costs"),
        ("draft_cost", ctypes.c_float),
    )


class _Outputs(ctypes.Structure):
    _fields_ = pointers("tokens", "hidden", "confidence")


class StopRule(msgspec.Struct, frozen=True):
    """When chains end early: all at once, where another token of each promises less than it costs.

    A chain's next token promises the chance that it and all before it are accepted. Costs are in tokens: those that
    could be had in the same time otherwise.
    """

    chances: NDArray[np.float32]
    """[T, 2, CONFIDENCE_LEVELS]: chance of a tenant's greedy and sampled token, by the draft's confidence"""
    verify_costs: Sequence[float]
    """By place: of verifying one more token"""
    draft_cost: float
    """Of another token for each sequence"""


class UnreadTokens(msgspec.Struct, frozen=True):
    """T known tokens that a draft reads before it drafts, laid end to end: the last ones of each of S sequences.

    The first of the sequences are those of the chains, in their order.
    """

    token_ids: Sequence[int]
    """[T]"""
    positions: Sequence[int]
    """[T], of their entries"""
    slots: Sequence[int]
    """[T], where these are"""
    query_start: Sequence[int]
    """[S + 1]: the tokens of each sequence"""
    seq_lens: Sequence[int]
    """[S]: places up to the last entry"""
    before: Sequence[int]
    """[T]: a row of ``g`` for each token, that of the position before it"""
    g: torch.Tensor
    """[.., hidden] bf16, contiguous: what the draft sees of a position, fused"""
    lora: LoraRows | None = None
    """What they are adapted by, one a token"""


class ChainBatch(msgspec.Struct, frozen=True):
    """B sequences, the longest chain first."""

    lengths: Sequence[int]
    """Draft tokens of each; at least 1"""
    positions: Sequence[int]
    """Of the last known token"""
    block_tables: NDArray[np.int32]
    """[S, max_blocks], also of the further sequences whose tokens are read"""
    sampling: RowSampling | None = None
    """None: all greedy"""
    slabs: Sequence[int] | None = None
    """The tail of each, where there are tails"""
    sessions: Sequence[int] | None = None
    """Whose prior each has, -1 for none; None: nobody has one"""
    texts: Sequence[int] | None = None
    """With ``sessions``: whose repeats count, -1 for none"""
    lora: LoraRows | None = None
    """What the draft's tokens are adapted by, one a row"""
    stop: StopRule | None = None
    """None: every chain gets its length"""
    tenants: Sequence[int] = ()
    """With ``stop``: the number of each one's tenant among the T"""
    acceptance: Sequence[Sequence[float]] = ()
    """With ``stop``: [B][the longest chain], chances by place, before it is drafted, if those before it are accepted"""


class ChainResult(msgspec.Struct, frozen=True):
    """Of B rows and S steps, as many as were made; what is beyond the end of a chain is undefined."""

    tokens: list[list[int]]
    """[B][S]"""
    hidden: torch.Tensor
    """[at least S, B, hidden] bf16, from which each token was chosen"""
    confidence: list[list[int]] | None
    """[B][S] levels of the tokens, where chains may end early"""


@dataclass(frozen=True)
class NativeChain:
    """A draft whose chains run in one call."""

    team: Team
    """Its threads"""
    layer: Decoder
    """The draft's"""
    norm: torch.Tensor
    """Its output norm, float32 [hidden]"""
    embedding: PackedMatrix
    """The target's, or the draft's own"""
    head: PackedMatrix
    """Likewise"""
    core: PackedMatrix
    """Rows of the head that all sequences share"""
    cache: KvCache
    """The draft's keys and values; the last token of each chain gets none"""
    core_ids: torch.Tensor | None
    """[K] int32, the tokens of these rows; None: all"""
    tails: TailSlabs | None
    """Of the sequences; None: none"""
    sessions: tuple[Sessions, Texts] | None
    """Whose priors they have, and texts, whose repeats count in these; None: nobody has one"""
    candidates: int
    """Of each token that are looked at, where not only the best one counts"""
    row_of: torch.Tensor | None = None
    """[vocab] int32, each token's row of ``head``, -1: it has none; None: the row of its number"""
    shift: int = 0
    """A token's keys and values lie so many places before the token's own"""
    norm_output: bool = False
    """Whether the draft's state is what its output norm gives"""

    def run(self, batch: ChainBatch, unread: UnreadTokens) -> ChainResult:
        """Read, and draft."""
        num_rows, steps, hidden = len(batch.lengths), batch.lengths[0], self.norm.shape[0]
        only_best = batch.sampling is None and batch.sessions is None and batch.stop is None
        most = self.core.n + (0 if self.tails is None else self.tails.slots)
        count = 1 if only_best else min(self.candidates, most)
        states = torch.empty(steps, num_rows, hidden, dtype=torch.bfloat16)
        tokens, levels = (array("i", bytes(4 * steps * num_rows)) for _ in range(2))
        arrays = _arrays(batch)
        rows = _Rows(num_rows, steps, batch.block_tables.shape[1], count)
        for name, values in arrays.items():
            setattr(rows, name, values.buffer_info()[0])
        if batch.stop is not None:
            rows.draft_cost = batch.stop.draft_cost
        rows.kept = _lora_of(rows, batch.lora)
        places = tokens.buffer_info()[0], states.data_ptr(), None if batch.stop is None else levels.buffer_info()[0]
        structs = self._model, _unread_struct(unread), rows, _Outputs(*places)
        made = load_library().evo_draft_chain(self.team.handle, *map(ctypes.byref, structs))
        of_rows = [slice(row, made * num_rows, num_rows) for row in range(num_rows)]
        confidence = None if batch.stop is None else [levels[of_row].tolist() for of_row in of_rows]
        return ChainResult([tokens[of_row].tolist() for of_row in of_rows], states, confidence)

    @functools.cached_property
    def _model(self) -> _Model:
        tails = None if self.tails is None else self.tails.struct
        model = _Model(
            *(self.layer.handle, address(self.norm), len(self.norm)),
            *(matrix.struct for matrix in (self.embedding, self.head, self.core)),
            address(self.core_ids),
            address(self.row_of),
            None if tails is None else ctypes.addressof(tails),
            *((None, None) if self.sessions is None else (one.handle for one in self.sessions)),
            ctypes.addressof(self.cache.struct),
            *(self.shift, self.norm_output),
        )
        model.kept = tails  # alive as long as its address is used
        return model


def _unread_struct(unread: UnreadTokens) -> _Unread:
    """The tokens as the kernels read them; the structure keeps its arrays alive."""
    names = ("token_ids", "positions", "slots", "query_start", "seq_lens", "before")
    arrays = [array("i", getattr(unread, name)) for name in names]
    struct = _Unread(len(unread.token_ids), len(unread.seq_lens), *(values.buffer_info()[0] for values in arrays))
    struct.g, struct.kept = unread.g.data_ptr(), (arrays, _lora_of(struct, unread.lora))
    return struct


def _lora_of(struct: _Unread | _Rows, lora: LoraRows | None) -> NativeLora | None:
    """Write adapters into a structure of the kernels; what is returned must live as long as that."""
    native = None if lora is None else lora.native
    struct.lora = None if native is None else ctypes.addressof(native.pointer.contents)
    return native


def _arrays(batch: ChainBatch) -> dict[str, array[Any]]:
    """The rows' arrays by name; they must outlive the call. (Python's own: a small one costs a fraction of NumPy's.)"""
    arrays: dict[str, array[Any]] = {"lengths": array("i", batch.lengths), "positions": array("i", batch.positions)}
    arrays["block_tables"] = array("i", batch.block_tables.tobytes())
    if batch.slabs is not None:
        arrays["slabs"] = array("i", batch.slabs)
    if batch.sampling is not None:
        arrays |= batch.sampling.arrays()
    if batch.sessions is not None and batch.texts is not None:
        arrays |= {"sessions": array("i", batch.sessions), "texts": array("i", batch.texts)}
    if (stop := batch.stop) is not None:
        arrays["tenants"] = array("i", batch.tenants)
        arrays["acceptance"] = array("f", chain.from_iterable(batch.acceptance))
        arrays["verify_costs"], arrays["chances"] = array("f", stop.verify_costs), array("f", stop.chances.tobytes())
    return arrays
