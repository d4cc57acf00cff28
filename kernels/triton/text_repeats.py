"""What continues repeats of texts, as candidates of a draft, as a Triton kernel: a program a row.

That is ``include`` and ``TextIndex::find`` of kernels/csrc/sessions. Texts are read where the host has them.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from evospec.kernels.head_rows import HeadRows
from evospec.kernels.session_memory import DraftedRounds, TextMemory
from evospec.kernels.session_options import MAX_REPEATS

_REPEATS = tl.constexpr(MAX_REPEATS)  # that are looked at, and most tokens of one
_WIDTH = 128  # of hidden, at a time


@triton.jit
def _any(matrix, AXIS: tl.constexpr):
    return tl.max(matrix.to(tl.int32), axis=AXIS) == 1


@triton.jit
def _end(text, size, drafts, drafts_stride, num_drafts):
    """The last tokens of a text that goes on with drafts, backwards; -1 for those before its begin."""
    back = tl.arange(0, _REPEATS)
    place = size - 1 + num_drafts - back
    token = tl.load(text + place, mask=(place >= 0) & (place < size), other=-1)
    draft = tl.load(drafts + (num_drafts - 1 - back) * drafts_stride, mask=back < num_drafts, other=-1)
    return tl.where(back < num_drafts, draft, token)


@triton.jit
def _latest_place(before, last, text, latest, num_buckets, factor):
    """The last place right after two tokens, -1 if there is none (``TextIndex::bucket``)."""
    mixed = ((before.to(tl.int64) << 32) | last.to(tl.int64)) * factor
    at = (((mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * factor) >> 32) & (num_buckets - 1)
    place = tl.load(latest + at)
    first = tl.load(text + place - 2, mask=place >= 2, other=-1)
    second = tl.load(text + place - 1, mask=place >= 2, other=-1)
    while (place >= 0) & ((first != before) | (second != last)):
        at = (at + 1) & (num_buckets - 1)
        place = tl.load(latest + at)
        first = tl.load(text + place - 2, mask=place >= 2, other=-1)
        second = tl.load(text + place - 1, mask=place >= 2, other=-1)
    return place


@triton.jit
def _repeats(end, text, previous, latest, num_buckets, factor):
    """Tokens that followed repeats of ``end``, the latest first, and how long these are; ``end`` is backwards."""
    index = tl.arange(0, _REPEATS)
    last, before = tl.max(tl.where(index == 0, end, -1), axis=0), tl.max(tl.where(index == 1, end, -1), axis=0)
    places = tl.full((_REPEATS,), -1, tl.int32)
    if before >= 0:
        place = _latest_place(before, last, text, latest, num_buckets, factor)
        for i in range(_REPEATS):
            places = tl.where(index == i, place, places)
            place = tl.load(previous + place, mask=place >= 0, other=-1)
    source = places[:, None] - 1 - index[None, :]
    is_there = (source >= 0) & (end >= 0)[None, :]
    is_equal = is_there & (tl.load(text + source, mask=is_there, other=-1) == end[None, :])
    length = tl.min(tl.where(is_equal, _REPEATS, index[None, :]), axis=1)
    return tl.load(text + places, mask=places >= 0, other=-1), length


@triton.jit
def _distinct(token, length):
    """Each token where it comes first, with its longest repeat; -1 elsewhere."""
    index = tl.arange(0, _REPEATS)
    is_same = (token[:, None] == token[None, :]) & (token >= 0)[:, None]
    comes_again = _any(is_same & (index[None, :] < index[:, None]), 1)
    return tl.where(comes_again, -1, token), tl.max(tl.where(is_same, length[None, :], 0), axis=1)


@triton.jit
def _places(token, own, inside):
    """[repeats, columns]: the place of each token that is no candidate yet, that of the weakest of those that are."""
    is_own = (token >= 0)[:, None] & (token[:, None] == own[None, :])
    is_new, has_room = (token >= 0) & (_any(is_own, 1) == 0), inside & (_any(is_own, 0) == 0)
    room = has_room.to(tl.int32)
    number, from_last = tl.cumsum(is_new.to(tl.int32), axis=0), tl.sum(room, axis=0) - tl.cumsum(room, axis=0) + 1
    return is_new[:, None] & has_room[None, :] & (number[:, None] == from_last[None, :])


@triton.jit
def _head_logits(rows, has_row, hidden, head, width, WIDTH: tl.constexpr):
    """Of some rows of the head."""
    sums = tl.zeros((_REPEATS,), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        x = tl.load(hidden + k, mask=k < width, other=0.0).to(tl.float32)
        is_w = has_row[:, None] & (k < width)[None, :]
        w = tl.load(head + rows[:, None].to(tl.int64) * width + k[None, :], mask=is_w, other=0.0)
        sums += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    return sums


@triton.jit(do_not_specialize=["num_drafts"])
def _repeats_kernel(
    found_tokens,
    found_logits,
    tokens,
    logits,
    features,
    hidden,
    head,
    row_of,
    drafts,
    drafts_stride,
    texts,
    text_tokens,
    previous,
    latest,
    sizes,
    feature_stride,
    capacity,
    num_buckets,
    factor,
    num_drafts,
    columns,
    width,
    HAS_ROW_OF: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(texts + row).to(tl.int64)
    size, is_known = tl.load(sizes + slot, mask=slot >= 0, other=0), slot >= 0
    slot = tl.maximum(slot, 0)
    text = text_tokens + slot * capacity
    end = _end(text, size, drafts + row, drafts_stride, tl.where(is_known, num_drafts, 0))
    token, length = _repeats(end, text, previous + slot * capacity, latest + slot * num_buckets, num_buckets, factor)
    token, length = _distinct(token, length)

    column = tl.arange(0, COLUMNS)
    at, inside = row * columns + column, column < columns
    own = tl.load(found_tokens + at, mask=inside, other=-1)
    logit = tl.load(found_logits + at, mask=inside, other=float("-inf"))
    takes = _places(token, own, inside)
    own = tl.where(_any(takes, 0), tl.max(tl.where(takes, token[:, None], -1), axis=0), own)
    of_head = token
    if HAS_ROW_OF:
        of_head = tl.load(row_of + token, mask=token >= 0, other=-1)
    gets = takes & (of_head >= 0)[:, None]  # one that the head lacks keeps the logit of whose place it took
    if tl.max(tl.max(gets.to(tl.int32), axis=1), axis=0) == 1:
        of_rows = _head_logits(of_head, _any(gets, 1), hidden + row * width, head, width, WIDTH)
        logit = tl.where(_any(gets, 0), tl.sum(tl.where(gets, of_rows[:, None], 0.0), axis=0), logit)
    continues = (token >= 0)[:, None] & (token[:, None] == own[None, :])
    longest = tl.max(tl.where(continues, length[:, None], 1), axis=0)
    tl.store(tokens + at, own, mask=inside)
    tl.store(logits + at, logit, mask=inside)
    tl.store(features + row * feature_stride + column, tl.log(longest.to(tl.float32)), mask=inside)


def include_repeats_triton(
    found: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    head: HeadRows,
    texts: TextMemory,
    of_rows: torch.Tensor,
    drafted: DraftedRounds,
    place: int,
) -> None:
    """Write the candidates of a round, and the last of their features; arguments as for ``GpuPrior.score``.

    ``of_rows`` [N] int32: the text of each row; -1: none.
    """
    logits, token_ids = found
    features, columns = drafted.features(place), logits.shape[1]
    hidden = hidden.contiguous()
    _repeats_kernel[(len(logits),)](
        *(token_ids, logits, drafted.token_ids(place), drafted.logits(place), features[:, -1]),
        *(hidden, head.rows, head.rows if head.row_of is None else head.row_of),
        *(drafted.block, drafted.block.stride(0), of_rows, texts.tokens, texts.previous, texts.latest, texts.sizes),
        *(features.stride(0), texts.tokens.shape[1], texts.latest.shape[1], texts.factor),
        *(place, columns, hidden.shape[1]),
        HAS_ROW_OF=head.row_of is not None,
        COLUMNS=triton.next_power_of_2(columns),
        WIDTH=_WIDTH,
    )
