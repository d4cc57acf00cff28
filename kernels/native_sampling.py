"""ctypes bindings of the compiled sampling kernels (kernels/csrc/sampling_api.cpp).

Logits are float32 [N, V] on the CPU, their rows contiguous; the other tensors are contiguous. ``team`` None runs on
the calling thread alone.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kernels.native import Team, address, load_library, unsupported_reason

if TYPE_CHECKING:
    from kernels.choose_tokens import RowSampling
    from kernels.penalties import SeenTokens


class _LogitRows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_size_t),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("allowed", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
    )


class _GumbelRows(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("seeds", "positions", "token_ids", "temperatures", "least", "limits", "undefined")
    )


_LIMITS = ("temperatures", "top_k", "top_p", "min_p")


class _TruncationRows(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _LIMITS)


class _SeenTokens(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "ends", "num_prompt", "penalties", "token_ids", "counts")),
        ("num_rows", ctypes.c_int),
    )


class _LogProbabilities(ctypes.Structure):
    _fields_ = (
        ("k", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("token_ids", "chosen", "largest", "columns")),
    )


class TailSlabsStruct(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("slots", ctypes.c_int),
        ("hidden", ctypes.c_int),
    )


class _TailQueries(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("hidden", "slabs"))


@functools.cache
def _is_built() -> bool:
    return unsupported_reason() is None


def can_take(logits: torch.Tensor) -> bool:
    """Whether these kernels serve such logits here."""
    return (
        logits.device.type == "cpu"
        and logits.dtype == torch.float32
        and logits.stride(-1) == 1
        and logits.numel() > 0
        and _is_built()
    )


def _rows(
    logits: torch.Tensor, allowed: torch.Tensor | None = None, places: array[int] | None = None
) -> ctypes._CArgObject:
    """The rows of logits, or those at some places; ``places`` must outlive the call."""
    count = len(logits) if places is None else len(places)
    of_places = None if places is None else places.buffer_info()[0]
    return ctypes.byref(
        _LogitRows(logits.data_ptr(), logits.stride(0), count, logits.shape[1], address(allowed), of_places)
    )


def _handle(team: Team | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None) if team is None else team.handle


def gumbel_argmax(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor | None,
    temperatures: torch.Tensor,
    least: torch.Tensor | None,
    allowed: torch.Tensor | None,
    team: Team | None,
) -> torch.Tensor:
    """As ``kernels.gumbel_argmax``; token_ids are int32 here."""
    out = torch.empty(len(logits), dtype=torch.int64)
    how = _GumbelRows(*(address(tensor) for tensor in (seeds, positions, token_ids, temperatures, least)))
    load_library().evo_gumbel_argmax(_handle(team), _rows(logits, allowed), ctypes.byref(how), address(out))
    return out


def choose_tokens(
    logits: torch.Tensor,
    sampling: RowSampling | None,
    positions: Sequence[int],
    token_ids: torch.Tensor | None,
    allowed: torch.Tensor | None,
    team: Team | None,
) -> list[int]:
    """As ``kernels.choose_tokens``; token_ids are int32 here."""
    # Python's own arrays: where there are few rows, every call of a tensor library costs more than what it holds.
    out, undefined = array("q", bytes(8 * len(logits))), array("B", bytes(len(logits)))
    how = _GumbelRows(token_ids=address(token_ids), undefined=undefined.buffer_info()[0])
    if sampling is not None:
        arrays = {"positions": array("q", positions), **sampling.arrays()}
        pointers = {name: values.buffer_info()[0] for name, values in arrays.items()}
        how.seeds, how.positions, how.temperatures = (pointers[name] for name in ("seeds", "positions", "temperatures"))
        if sampling.is_truncated:
            limits = _TruncationRows(*(pointers[name] for name in _LIMITS))
            how.limits = ctypes.addressof(limits)
    load_library().evo_gumbel_argmax(
        _handle(team), _rows(logits, allowed), ctypes.byref(how), ctypes.c_void_p(out.buffer_info()[0])
    )
    if any(undefined):
        return [-1 if is_undefined else token_id for token_id, is_undefined in zip(out, undefined, strict=True)]
    return out.tolist()


def kept_thresholds(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    allowed: torch.Tensor | None,
    team: Team | None,
) -> torch.Tensor:
    """As ``kernels.kept_thresholds``."""
    out = torch.empty(len(logits))
    limits = _TruncationRows(*(address(tensor) for tensor in (temperatures, top_k, top_p, min_p)))
    load_library().evo_kept_thresholds(_handle(team), _rows(logits, allowed), ctypes.byref(limits), address(out))
    return out


def topk_rows(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None, team: Team | None, rows: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.topk``, k at most the number of columns; ids are int32 here."""
    places = None if rows is None else array("i", rows)
    count = len(logits) if places is None else len(places)
    values, indices = torch.empty(count, k), torch.empty(count, k, dtype=torch.int64)
    wanted = _rows(logits, places=places)
    load_library().evo_top_k(_handle(team), wanted, k, address(ids), address(values), address(indices))
    return values, indices


def log_probabilities(
    logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], k: int, team: Team | None
) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """As ``kernels.log_probabilities``, k at most the number of columns."""
    count = len(rows)
    places, tokens = array("i", rows), array("i", token_ids)
    chosen, largest = array("d", bytes(8 * count)), array("d", bytes(8 * count * k))
    columns = array("i", bytes(4 * count * k))
    addresses = (one.buffer_info()[0] for one in (tokens, chosen, largest, columns))
    wanted = ctypes.byref(_LogProbabilities(k, *addresses))
    load_library().evo_log_probabilities(_handle(team), _rows(logits, places=places), wanted)
    starts = range(0, count * k, k) if k else [0] * count
    top = [largest[start : start + k].tolist() for start in starts]
    return chosen.tolist(), [columns[start : start + k].tolist() for start in starts], top


def can_take_tails(rows: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether these kernels multiply such slabs [num_slabs, slots, hidden] with such hidden states [N, hidden]."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == hidden.dtype == torch.bfloat16
        and hidden.shape[1] % 32 == 0
        and _is_built()
    )


def draft_top_k(
    logits: torch.Tensor,
    k: int,
    token_ids: torch.Tensor | None,
    hidden: torch.Tensor,
    tail_rows: torch.Tensor,
    tail_token_ids: torch.Tensor,
    slabs: torch.Tensor,
    team: Team | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.draft_head`` with tails, from the core's logits; k at most the number of candidates."""
    hidden = hidden.contiguous()  # named: a copy must outlive the call
    values, chosen = torch.empty(len(logits), k), torch.empty(len(logits), k, dtype=torch.int32)
    tails = TailSlabsStruct(tail_rows.data_ptr(), tail_token_ids.data_ptr(), *tail_rows.shape[1:])
    queries = _TailQueries(hidden.data_ptr(), slabs.data_ptr())
    load_library().evo_draft_top_k(
        *(_handle(team), _rows(logits), address(token_ids), ctypes.byref(tails), ctypes.byref(queries)),
        *(k, address(values), address(chosen)),
    )
    return values, chosen


def penalize(logits: torch.Tensor, seen: SeenTokens) -> torch.Tensor:
    """As ``kernels.penalties``."""
    before = torch.empty(len(seen.token_ids))
    load_library().evo_penalize(address(logits), logits.stride(0), _seen(seen), address(before))
    return before


def put_back(logits: torch.Tensor, seen: SeenTokens, before: torch.Tensor) -> None:
    """As ``kernels.penalties``."""
    load_library().evo_put_back(address(logits), logits.stride(0), _seen(seen), address(before))


def _seen(seen: SeenTokens) -> ctypes._CArgObject:
    arrays = (seen.rows, seen.ends, seen.num_prompt, seen.penalties, seen.token_ids, seen.counts)
    return ctypes.byref(_SeenTokens(*(one.buffer_info()[0] for one in arrays), len(seen.rows)))
