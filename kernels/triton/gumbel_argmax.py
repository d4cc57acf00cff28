"""``kernels.gumbel_argmax`` as a Triton kernel: the same hash, the same float64 logarithms, the same tie rule."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_NO_TOKEN = tl.constexpr(2**31 - 1)
_BLOCK = 1024
_BLOCKS_PER_PROGRAM = 8


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(token_ids, key):
    """Standard Gumbel noise, float32; key is the row's, int64."""
    x = token_ids.to(tl.uint32) * 0x9E3779B1 + (key & 0xFFFFFFFF).to(tl.uint32)
    x = _mix32(_mix32(x) ^ ((key >> 32) & 0xFFFFFFFF).to(tl.uint32))
    # int32(x) + 2^31 is x with its highest bit flipped, unsigned. The constants are exact in float32, as Triton has it.
    uniform = ((x ^ 0x80000000).to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _scores(x, ids, key, temperature):
    """Logits by temperature, with the noise of these tokens; without either where the temperature is 0."""
    is_greedy = temperature == 0.0
    scores = tl.div_rn(x, tl.zeros_like(x) + tl.where(is_greedy, 1.0, temperature))
    return tl.where(is_greedy, scores, scores + _noise(ids, key))


@triton.jit
def _gumbel_argmax_kernel(
    logits,
    stride,
    token_ids,
    keys,
    temperatures,
    least,
    best_scores,
    best_ids,
    columns,
    HAS_IDS: tl.constexpr,
    HAS_LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Each program: the best of one row's NUM_BLOCKS x BLOCK columns."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, temperature = tl.load(keys + row), tl.load(temperatures + row)
    best_score, best_id = float("-inf"), _NO_TOKEN
    for block in range(NUM_BLOCKS):
        column = (piece * NUM_BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(logits + row * stride + column, mask=inside, other=float("-inf"))
        ids = column
        if HAS_IDS:
            ids = tl.load(token_ids + row * columns + column, mask=inside, other=0)
        if HAS_LEAST:
            x = tl.where(x < tl.load(least + row), float("-inf"), x)
        scores = _scores(x, ids, key, temperature)
        score = tl.max(scores, axis=0)
        token_id = tl.min(tl.where(inside & (scores == score), ids, _NO_TOKEN), axis=0)
        is_better = (score > best_score) | ((score == best_score) & (token_id < best_id))
        best_score, best_id = tl.where(is_better, score, best_score), tl.where(is_better, token_id, best_id)
    at = row * tl.num_programs(1) + piece
    tl.store(best_scores + at, best_score)
    tl.store(best_ids + at, best_id)


def gumbel_argmax_triton(
    logits: torch.Tensor,
    keys: torch.Tensor,
    token_ids: torch.Tensor | None = None,
    *,
    temperatures: torch.Tensor,
    least: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``kernels.gumbel_argmax.gumbel_argmax`` where all is allowed; ``keys`` are its ``row_keys``."""
    rows, columns = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    pieces = triton.cdiv(columns, _BLOCK * _BLOCKS_PER_PROGRAM)
    scores = torch.empty(rows, pieces, device=logits.device)
    ids = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    _gumbel_argmax_kernel[(rows, pieces)](
        logits,
        logits.stride(0),
        logits if token_ids is None else token_ids.int().contiguous(),
        keys,
        temperatures,
        logits if least is None else least,
        scores,
        ids,
        columns,
        HAS_IDS=token_ids is not None,
        HAS_LEAST=least is not None,
        BLOCK=_BLOCK,
        NUM_BLOCKS=_BLOCKS_PER_PROGRAM,
    )
    best = scores == scores.amax(dim=1, keepdim=True)
    return ids.masked_fill(~best, torch.iinfo(torch.int32).max).amin(dim=1).long()
