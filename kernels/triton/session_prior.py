"""The prior of sessions on the candidates of draft tokens, as a Triton kernel: a program a row.

That is ``Sessions::score`` of kernels/csrc/sessions/prior.cpp. Sessions are read where the host has them.
"""

from __future__ import annotations

import ctypes

import torch

import triton
import triton.language as tl
from evospec.kernels.session_library import StateStruct
from evospec.kernels.session_memory import DraftedRounds, SessionMemory, TableMemory
from evospec.kernels.session_options import NUM_FEATURES, WAYS

HASH = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)  # as in C++, signed
_WAYS = tl.constexpr(WAYS)
_FEATURES = tl.constexpr(NUM_FEATURES)
_STATE = tl.constexpr(ctypes.sizeof(StateStruct))


@triton.jit
def _counted(
    own, session, key, unit, keys, tokens, counts, ROWS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr
):
    """Of each candidate log(1 + how often it came after a context), by a table of a session's (``ContextTable``).

    ``key``: of the context; below -1: there is none.
    """
    way, follower = tl.arange(0, _WAYS), tl.arange(0, WIDTH)
    first = session * ROWS + (((key * HASH) >> SHIFT) & (ROWS // _WAYS - 1)) * _WAYS
    is_there = (tl.load(keys + first + way) == key).to(tl.int32)
    at = (first + tl.max(is_there * way, axis=0)) * WIDTH + follower
    token = tl.where(tl.max(is_there, axis=0) == 1, tl.load(tokens + at), -1)
    value = tl.log(1.0 + tl.load(counts + at) / unit)
    is_own = (token >= 0)[None, :] & (token[None, :] == own[:, None])
    return tl.sum(tl.where(is_own, value[None, :], 0.0), axis=1)


@triton.jit
def _in_graph(own, token, offsets, tokens, values, width, WIDTH: tl.constexpr):
    """Of each candidate how likely it follows a token in general text; the token is below 0: there is none."""
    place = offsets + tl.maximum(token, 0)
    begin, end = tl.load(place), tl.load(place + 1)
    end = tl.where(token >= 0, tl.minimum(end, begin + width), begin)
    at = begin + tl.arange(0, WIDTH)
    follower = tl.load(tokens + at, mask=at < end, other=-1)
    value = tl.load(values + at, mask=at < end, other=0.0)
    is_own = (follower >= 0)[None, :] & (follower[None, :] == own[:, None])
    return tl.sum(tl.where(is_own, value[None, :], 0.0), axis=1)


@triton.jit
def _token_before(row, number, drafts, drafts_stride, num_drafts, last):
    """The last token (1) or the one before it (2) of a session that goes on with drafts."""
    draft = tl.load(drafts + (num_drafts - number) * drafts_stride + row, mask=num_drafts >= number, other=-1)
    own = tl.load(last + 2 + num_drafts - number, mask=num_drafts < number, other=-1)
    return tl.where(num_drafts >= number, draft, own).to(tl.int64)


@triton.jit(do_not_specialize=["num_drafts", "vocab"])
def _prior_kernel(
    tokens,
    logits,
    features,
    scores,
    best,
    drafts,
    drafts_stride,
    sessions,
    states,
    last,
    weights,
    unigrams,
    pair_keys,
    pair_tokens,
    pair_counts,
    triple_keys,
    triple_tokens,
    triple_counts,
    offsets,
    edges,
    edge_values,
    num_drafts,
    columns,
    vocab,
    num_edges,
    PRESENCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    PAIR_WIDTH: tl.constexpr,
    PAIR_SHIFT: tl.constexpr,
    TRIPLE_ROWS: tl.constexpr,
    TRIPLE_WIDTH: tl.constexpr,
    TRIPLE_SHIFT: tl.constexpr,
    EDGES: tl.constexpr,
    ORDER: tl.constexpr,
):
    """``ORDER``: the most tokens in a row that count; ``EDGES``: 0 where there is no graph, else a power of two."""
    row = tl.program_id(0).to(tl.int64)
    session = tl.load(sessions + row).to(tl.int64)
    is_known, session = session >= 0, tl.maximum(session, 0)
    column = tl.arange(0, COLUMNS)
    at, inside = row * columns + column, column < columns
    own = tl.load(tokens + at, mask=inside, other=-1)
    unit, gain = tl.load(states + session * (_STATE // 8)), tl.load(states + session * (_STATE // 8) + 1)
    least = (unit * PRESENCE).to(tl.float32)
    count = tl.load(unigrams + session * vocab + own, mask=own >= 0, other=-1.0)
    in_session = tl.where(is_known, (count >= least).to(tl.float32), 0.0)

    unit = unit.to(tl.float32)
    last += session * (_STATE // 4)
    one = tl.where(is_known, _token_before(row, 1, drafts, drafts_stride, num_drafts, last), -2)
    two = _token_before(row, 2, drafts, drafts_stride, num_drafts, last)
    after_one, after_two, in_graph = tl.zeros_like(in_session), tl.zeros_like(in_session), tl.zeros_like(in_session)
    if ORDER >= 2:
        pair = tl.where(one >= 0, one, -2)
        after_one = _counted(
            own, session, pair, unit, pair_keys, pair_tokens, pair_counts, PAIR_ROWS, PAIR_WIDTH, PAIR_SHIFT
        )
    if ORDER >= 3:
        triple = tl.where((one >= 0) & (two >= 0), (two << 31) | one, -2)
        after_two = _counted(
            own,
            session,
            triple,
            unit,
            triple_keys,
            triple_tokens,
            triple_counts,
            TRIPLE_ROWS,
            TRIPLE_WIDTH,
            TRIPLE_SHIFT,
        )
    if EDGES:
        in_graph = _in_graph(own, one, offsets, edges, edge_values, num_edges, EDGES)

    strength = tl.where(is_known & (gain >= 0.0), 1.0, 0.0)  # none while the prior costs agreement
    weight = weights + session * _FEATURES
    feature = features + row * _FEATURES * columns + column
    score = tl.load(logits + at, mask=inside, other=float("-inf"))
    score += in_session * (tl.load(weight) * strength)
    score += after_one * (tl.load(weight + 1) * strength)
    score += after_two * (tl.load(weight + 2) * strength)
    score += in_graph * (tl.load(weight + 3) * strength)
    score += tl.load(feature + 4 * columns, mask=inside, other=0.0) * (tl.load(weight + 4) * strength)
    tl.store(feature, in_session, mask=inside)
    tl.store(feature + columns, after_one, mask=inside)
    tl.store(feature + 2 * columns, after_two, mask=inside)
    tl.store(feature + 3 * columns, in_graph, mask=inside)
    tl.store(scores + at, score, mask=inside)
    first = tl.argmax(tl.where(inside, score, float("-inf")), axis=0)
    tl.store(best + row, tl.maximum(tl.max(tl.where(column == first, own, -1), axis=0), 0))


def add_priors_triton(
    memory: SessionMemory, of_rows: torch.Tensor, drafted: DraftedRounds, place: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the candidates that ``drafted`` has for a round, and write their features; as ``GpuPrior.score``.

    ``of_rows`` [N] int32: the session of each row; -1: none.
    """
    logits, features = drafted.logits(place), drafted.features(place)
    scores, best = torch.empty_like(logits), torch.empty_like(of_rows)
    pairs, triples, graph = memory.pairs, memory.triples, memory.graph
    edges = graph or (memory.weights,) * 3
    columns = logits.shape[1]
    _prior_kernel[(len(logits),)](
        *(drafted.token_ids(place), logits, features, scores, best, drafted.block, drafted.block.stride(0)),
        *(of_rows, memory.states, memory.last, memory.weights, memory.unigrams),
        *(pairs.keys, pairs.tokens, pairs.counts, triples.keys, triples.tokens, triples.counts, *edges),
        *(place, columns, memory.unigrams.shape[1], memory.num_edges),
        PRESENCE=memory.presence,
        COLUMNS=triton.next_power_of_2(columns),
        **_sizes("PAIR", pairs),
        **_sizes("TRIPLE", triples),
        EDGES=0 if graph is None else triton.next_power_of_2(memory.num_edges),
        ORDER=memory.order,
    )
    return scores, best


def _sizes(name: str, table: TableMemory) -> dict[str, int]:
    shift = min(table.shift, 63)  # 64 where there is one group of rows, whose number 0 needs no bits
    return {f"{name}_ROWS": table.keys.shape[1], f"{name}_WIDTH": table.tokens.shape[2], f"{name}_SHIFT": shift}
