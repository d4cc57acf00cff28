"""flashinfer's two wrappers for ``tests.emulated_cuda``: its signatures and its rules, computed in plain torch."""

from __future__ import annotations

import importlib.machinery
import inspect
import math
import sys
import types
from typing import Any

import torch

from tests.emulated_cuda import DeviceTensor, Moment, compute_all, held, launch, wait

PREFILL, DECODE = "BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"
_PARAMETERS = {
    (PREFILL, "__init__"): "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf=None, "
    "paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, "
    "mask_indptr_buf=None, backend='auto', jit_args=None, jit_kwargs=None, variant_owns_mask=False, "
    "max_total_num_rows=None",
    (PREFILL, "plan"): "qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, "
    "num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, "
    "pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, "
    "rope_scale=None, rope_theta=None, q_data_type='float16', kv_data_type=None, o_data_type=None, non_blocking=True, "
    "prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None, "
    "seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None, max_sequence_kv=None, "
    "fixed_split_size=None, disable_split_kv=False, uniform_q_len=None, use_token_head_sf=False",
    (PREFILL, "run"): "q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, "
    "return_lse=False, lse_base='log2', lse_layout='NH', enable_pdl=None, window_left=None, sinks=None, "
    "kv_cache_sf=None, skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None",
    (DECODE, "__init__"): "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, use_tensor_cores=False, "
    "paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend='auto', "
    "jit_args=None, jit_kwargs=None",
    # What `plan` hands on to, where nothing but these seven comes by position.
    (DECODE, "_plan_impl"): "indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, "
    "pos_encoding_mode='NONE', window_left=-1, window_right=0, logits_soft_cap=None, q_data_type='float16', "
    "kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, "
    "non_blocking=True, block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False, "
    "q_len_per_req=1, is_causal=None, use_token_head_sf=False",
    (DECODE, "run"): "q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, "
    "return_lse=False, enable_pdl=None, window_left=None, sinks=None, q_len_per_req=None, "
    "skip_softmax_threshold_scale_factor=None, kv_cache_sf=None",
}
"""Of flashinfer-python 0.7.4."""
_BUFFERS = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
SIGNATURES = {
    name: inspect.signature(eval(f"lambda self, {parameters}: None")) for name, parameters in _PARAMETERS.items()
}


class _Wrapper:
    """What both have in common: a plan, in buffers of its own or in those of a graph."""

    name: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.options = self._bound("__init__", *args, **kwargs)
        assert isinstance(self.options["float_workspace_buffer"], DeviceTensor)
        self.num_rows: int | None = None
        self.planned: Moment | None = None

    def _bound(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = SIGNATURES[self.name, method].bind(self, *args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _plan(self, plan: dict[str, Any], qo: torch.Tensor, table: tuple[torch.Tensor, ...]) -> None:
        indptr, indices, last = table
        assert self.planned is None or self.planned.is_past, "the last plan may not have left its pinned memory"
        self.planned = Moment()
        for one in (qo, *table):
            assert one.dtype == torch.int32
        for one in (qo, indptr, last):
            assert not isinstance(one, DeviceTensor), "plans are made on the host: it would wait for a copy"
        assert int(indptr[-1]) == len(indices)
        assert bool(((last >= 1) & (last <= plan["page_size"])).all())
        assert bool((qo.diff() >= 0).all())
        if not isinstance(indices, DeviceTensor):
            wait("flashinfer copies indices from the host")
        sources = [held(one) for one in (qo, indptr, indices, last)]
        if self.options.get("use_cuda_graph"):
            self.num_rows = self.num_rows or int(qo[-1])
            assert int(qo[-1]) <= self.num_rows
            self.buffers = [held(self.options[name]) for name in _BUFFERS]
            assert (len(qo), len(last)) == (len(self.buffers[0]), len(self.buffers[3]))
            for buffer, source in zip(self.buffers, sources, strict=True):
                buffer[: len(source)].copy_(source)
        else:
            self.buffers = [source.clone() for source in sources]
        self.plan_of, self.total = plan, int(qo[-1])

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        call, plan = self._bound("run", *args, **kwargs), self.plan_of
        q, (keys, values) = call["q"], call["paged_kv_cache"]
        assert q.is_contiguous()
        assert len(q) == self.total
        assert (q.dtype, keys.dtype) == (plan["q_data_type"], plan["kv_data_type"])
        assert keys.stride() == values.stride()
        assert keys.shape[1] == plan["page_size"]
        inputs = *map(held, (q, keys, values)), self.buffers, plan["sm_scale"], plan["window_left"]
        results = torch.zeros_like(held(q)), torch.zeros(q.shape[:2])
        out, log_sum = map(DeviceTensor, results)

        def compute() -> None:
            for result, new in zip(results, _attend(*inputs), strict=True):
                result.copy_(new)

        compute_all([compute])
        reads = [self.options[name] for name in _BUFFERS] if self.options.get("use_cuda_graph") else []
        launch("attention", compute, (q, keys, values, *reads))
        return (out, log_sum) if call["return_lse"] else out


class _Prefill(_Wrapper):
    name = PREFILL

    def plan(self, *args: Any, **kwargs: Any) -> None:
        plan = self._bound("plan", *args, **kwargs)
        assert plan["causal"]
        table = plan["paged_kv_indptr"], plan["paged_kv_indices"], plan["paged_kv_last_page_len"]
        self._plan(plan, plan["qo_indptr"], table)


class _Decode(_Wrapper):
    name = DECODE

    def plan(self, *args: Any, **kwargs: Any) -> None:
        plan = self._bound("_plan_impl", *args, **kwargs)
        table = plan["indptr"], plan["indices"], plan["last_page_len"]
        self._plan(plan, torch.arange(len(table[2]) + 1, dtype=torch.int32), table)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, buffers: list[torch.Tensor], scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each sequence's queries, which are the last of its tokens; and the sums of their weights, to
    base 2."""
    qo, indptr, indices, last = (one.tolist() for one in buffers)
    out, log_sum, group = torch.zeros_like(q), torch.zeros(q.shape[:2]), q.shape[1] // keys.shape[2]
    for row in range(len(last)):
        begin, end = qo[row], qo[row + 1]
        pages = indices[indptr[row] : indptr[row + 1]]
        length = (len(pages) - 1) * keys.shape[1] + last[row]
        if begin == end:
            continue
        k, v = (one[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for one in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k) * scale
        place, query = torch.arange(length), torch.arange(length - (end - begin), length)[:, None]
        is_seen = (place <= query) & ((window < 0) | (place >= query - window))
        scores = scores.masked_fill(~is_seen, -torch.inf)
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
        log_sum[begin:end] = scores.logsumexp(-1).T / math.log(2)
    return out, log_sum


def install() -> None:
    """``import flashinfer`` gives these."""
    module = types.ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    for wrapper in (_Prefill, _Decode):
        setattr(module, wrapper.name, wrapper)
    sys.modules["flashinfer"] = module
