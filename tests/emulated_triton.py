"""The Triton kernels by name, in plain torch: Triton's interpreter would take minutes for a few steps.

They take a kernel's own arguments. That the kernels compute the same is tested elsewhere, one by one.
"""

from __future__ import annotations

from typing import Any

import torch

from evospec.kernels.batched_lora import batched_lora
from evospec.kernels.between_products import add_normed, gated, prepare_heads, rms_norm
from evospec.kernels.gumbel_argmax import _mix32_, signed
from evospec.kernels.heads import HeadNorms, Heads, Rotation
from evospec.kernels.int4 import dequantized, int4_product
from evospec.kernels.kept_thresholds import Limits, kept_thresholds, unpack_bits
from tests.reference.text_matches import TextMatches

_NOTHING = -(2**63)


def _core_kernel(hidden: Any, head: Any, keys: Any, rows: int, columns: int, *_: Any, BEST: int, **sizes: int) -> None:
    logits = hidden.float() @ head.float().T
    for piece, part in enumerate(torch.split(_sort_keys(logits, 0), sizes["COLUMNS"], dim=1)):
        _put_best(keys, piece * BEST, part, BEST)


def _tail_kernel(
    hidden: Any, rows: Any, ids: Any, slabs: Any, keys: Any, *numbers: int, BEST: int, **sizes: int
) -> None:
    logits = torch.einsum("nd,nsd->ns", hidden.float(), rows[slabs].float()).masked_fill(ids[slabs] < 0, -torch.inf)
    for piece, part in enumerate(torch.split(_sort_keys(logits, numbers[1]), sizes["SLOTS"], dim=1)):
        _put_best(keys, piece * BEST, part, BEST)


def _best_kernel(
    logits: Any, stride: int, rows: Any, keys: Any, columns: int, *, HAS_ROWS: bool, BEST: int, BLOCK: int
) -> None:
    wanted = logits[rows] if HAS_ROWS else logits
    for piece, part in enumerate(torch.split(_sort_keys(wanted, 0), BLOCK, dim=1)):
        _put_best(keys, piece * BEST, part, BEST)


def _sort_keys(logits: torch.Tensor, first: int) -> torch.Tensor:
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return ordered | (0x7FFFFFFF - first - torch.arange(logits.shape[1]))


def _put_best(keys: torch.Tensor, start: int, part: torch.Tensor, best: int) -> None:
    keys[:, start : start + best] = _NOTHING
    count = min(best, part.shape[1])
    keys[:, start : start + count] = part.topk(count, dim=1).values


def _gumbel_argmax_kernel(
    logits: Any,
    stride: int,
    token_ids: Any,
    keys: Any,
    temperatures: Any,
    least: Any,
    *out: Any,
    **how: Any,
) -> None:
    scores, best_ids, columns = out
    ids = token_ids if how["HAS_IDS"] else torch.arange(columns).expand(len(logits), -1)
    if how["HAS_LEAST"]:
        logits = logits.masked_fill(logits < least.unsqueeze(1), -torch.inf)
    key = keys.unsqueeze(1)
    x = ids.int() * signed(0x9E3779B1, 32) + key.int()
    scratch = torch.empty_like(x)
    _mix32_(x, scratch)
    x ^= (key >> 32).int()
    _mix32_(x, scratch)
    noise = x.double().add_(2.0**31 + 0.5).mul_(2.0**-32).log_().neg_().log_().neg_().float()
    is_greedy = (temperatures == 0).unsqueeze(1)
    found = logits / temperatures.unsqueeze(1).masked_fill(is_greedy, 1.0) + noise.masked_fill(is_greedy, 0.0)
    best = found.amax(dim=1, keepdim=True)
    scores.fill_(-torch.inf)[:, :1] = best
    best_ids.fill_(2**31 - 1)[:, 0] = torch.where(found == best, ids.long(), 2**31 - 1).amin(dim=1)


def _thresholds_kernel(logits: Any, stride: int, values: Any, temperatures: Any, *rest: Any, **sizes: int) -> None:
    top_k, top_p, min_p, least, suffices, *_ = rest
    least.copy_(kept_thresholds(logits, temperatures, Limits(top_k, top_p, min_p)))
    suffices.fill_(True)


def _lora_kernel(out: Any, x: Any, a: Any, b: Any, slots: Any, *numbers: int, **sizes: int) -> None:
    batched_lora(out, x, a, b, slots)


def _norm_kernel(
    x: Any, added: Any, added_weight: Any, weight: Any, total: Any, out: Any, *sizes: Any, **how: Any
) -> None:
    if how["HAS_ADDED"]:
        x = total.copy_(add_normed(x, added, added_weight if how["NORMS_ADDED"] else None, sizes[2]))
    if how["HAS_OUT"]:
        out.copy_(rms_norm(x, weight, sizes[2]))


def _heads_kernel(product: Any, stride: int, positions: Any, cos_sin: Any, *rest: Any, **how: Any) -> None:
    q_weight, k_weight, q_out, k_out, queries, keys, dim, _, eps = rest
    norms = HeadNorms(q_weight, k_weight, eps) if how["HAS_NORMS"] else None
    rotation = Rotation(cos_sin, positions) if how["HAS_ROTARY"] else None
    q, k, _ = prepare_heads(product, Heads(queries, keys, dim), norms, rotation)
    q_out.copy_(q)
    k_out.copy_(k)


def _gate_kernel(product: Any, out: Any, *numbers: Any, ACTIVATION: str, **sizes: int) -> None:
    out.copy_(gated(product, ACTIVATION))


def _int4_kernel(x: Any, codes: Any, scales: Any, out: Any, *numbers: int, **sizes: int) -> None:
    out.copy_(int4_product(x, codes, scales.view(torch.float16)))


def _expand_kernel(codes: Any, scales: Any, out: Any, *numbers: int, **sizes: int) -> None:
    out.copy_(dequantized(codes, scales.view(torch.float16), out.dtype))


def _edit_kernel(
    logits: Any, stride: int, rows: Any, ends: Any, token_ids: Any, factors: Any, addends: Any, **sizes: int
) -> None:
    index = rows.repeat_interleave(ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))), token_ids
    before = logits[index]
    edited = torch.where(before > 0, before / factors, before * factors) + addends
    logits[index] = torch.where(addends == -torch.inf, addends, edited)


def _mask_kernel(logits: Any, stride: int, allowed: Any, columns: int, **sizes: int) -> None:
    logits.masked_fill_(~unpack_bits(allowed, columns) & (logits < torch.inf), -torch.inf)


def _repeats_kernel(
    found_tokens: Any,
    found_logits: Any,
    tokens: Any,
    logits: Any,
    features: Any,
    hidden: Any,
    head: Any,
    row_of: Any,
    drafts: Any,
    drafts_stride: int,
    texts: Any,
    text_tokens: Any,
    previous: Any,
    latest: Any,
    sizes: Any,
    *numbers: int,
    **how: Any,
) -> None:
    tokens.copy_(found_tokens)
    logits.copy_(found_logits)
    features.zero_()
    for row, slot in enumerate(texts.tolist()):
        if slot < 0:
            continue
        text = TextMatches()
        text.extend(text_tokens[slot, : sizes[slot]].tolist())
        found, own = text.find(drafts[: numbers[4], row].tolist()), tokens[row].tolist()
        room = [column for column, token in enumerate(own) if token not in found]
        for token in [token for token in found if token not in own][: len(room)]:
            column, of_head = room.pop(), int(row_of[token]) if how["HAS_ROW_OF"] else token
            own[column] = token
            if of_head >= 0:
                logits[row, column] = head[of_head].float() @ hidden[row].float()
        tokens[row] = torch.tensor(own)
        features[row] = torch.tensor([found.get(token, 1) for token in own]).log()


def _prior_kernel(
    tokens: Any,
    logits: Any,
    features: Any,
    scores: Any,
    best: Any,
    drafts: Any,
    drafts_stride: int,
    sessions: Any,
    states: Any,
    last: Any,
    weights: Any,
    unigrams: Any,
    *rest: Any,
    **how: Any,
) -> None:
    pairs, triples, (offsets, edges, values), (place, *_, num_edges) = rest[:3], rest[3:6], rest[6:9], rest[9:]
    scores.copy_(logits)
    features[:, :4] = 0.0
    for row, session in enumerate(sessions.tolist()):
        if session < 0:
            continue
        own, (unit, gain) = tokens[row], states[session, :2].tolist()
        two, one = [*last[session].tolist(), *drafts[:place, row].tolist()][-2:]
        features[row, 0] = (own >= 0) & (unigrams[session][own] >= how["PRESENCE"] * unit)
        if one >= 0 and how["ORDER"] >= 2:
            features[row, 1] = _counted(own, pairs, session, one) / unit
        if min(one, two) >= 0 and how["ORDER"] >= 3:
            features[row, 2] = _counted(own, triples, session, two << 31 | one) / unit
        features[row, 1:3] = features[row, 1:3].log1p()
        if one >= 0 and how["EDGES"]:
            these = slice(offsets[one], min(offsets[one + 1], offsets[one] + num_edges))
            features[row, 3] = _sum_of(own, edges[these], values[these])
        scores[row] += (features[row] * weights[session].unsqueeze(1)).sum(dim=0) * (gain >= 0.0)
    best.copy_(tokens.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0].clamp(min=0))


def _counted(own: torch.Tensor, table: Any, session: int, key: int) -> torch.Tensor:
    keys, tokens, counts = (array[session] for array in table)
    places = (keys == key).nonzero()[:, 0]
    return _sum_of(own, tokens[places].flatten(), counts[places].flatten())


def _sum_of(own: torch.Tensor, tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of each token of ``own`` the values that ``tokens`` say of it."""
    return ((own.unsqueeze(1) == tokens) & (tokens >= 0)).float() @ values


KERNELS = {
    **{one.__name__: one for one in (_core_kernel, _tail_kernel, _best_kernel, _gumbel_argmax_kernel)},
    **{one.__name__: one for one in (_thresholds_kernel, _lora_kernel, _repeats_kernel, _prior_kernel)},
    **{one.__name__: one for one in (_edit_kernel, _mask_kernel, _norm_kernel, _heads_kernel, _gate_kernel)},
    **{one.__name__: one for one in (_int4_kernel, _expand_kernel)},
}
