"""Paged attention on NVIDIA GPUs by flashinfer's wrappers, fed from our block tables.

Written against flashinfer-python 0.7.2. NOT RUN on a GPU so far: none was available where this was written. What was
checked without one, and how to run the rest: docs/decisions/005-attention-backends.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.batch import ForwardBatch
from evospec.engine.gpu_memory import ATTENTION_WORKSPACE
from evospec.engine.models.config import ModelError
from evospec.kernels.upload import upload

_LAYOUT = "NHD"
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)


class PageTable(NamedTuple):
    """Block tables in compressed rows: sequence b owns ``indices[indptr[b] : indptr[b + 1]]``.

    ``indptr`` [B + 1] and ``last_page_len`` [B] (tokens in the last block) are int32 on the CPU, where wrappers plan;
    ``indices`` is int32 on the model's device.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


def page_table(batch: ForwardBatch, block_size: int) -> PageTable:
    """The blocks that hold the batch's context, this step's tokens included. Blocks allocated ahead are left out."""
    seq_lens, tables = batch.host.seq_lens.cpu(), batch.host.block_tables.cpu()
    num_pages = (seq_lens + block_size - 1) // block_size
    used = [row[:count] for row, count in zip(tables.numpy(), num_pages.tolist(), strict=True)]
    return PageTable(
        indptr=torch.nn.functional.pad(num_pages.cumsum(0, dtype=torch.int32), (1, 0)),
        indices=upload(batch.token_ids.device, np.concatenate(used))[0],
        last_page_len=seq_lens - (num_pages - 1) * block_size,
    )


class _Wrappers:
    """flashinfer's, by the window of the layers that they run in; None: layers that see everything."""

    def __init__(self, spec: AttentionSpec, make: Callable[[], Any]) -> None:
        self.by_window = {window: make() for window in {spec.window(layer) for layer in range(spec.num_layers)}}
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def plan(self, *arguments: Any, **options: Any) -> None:
        """Plan all of them.

        A wrapper writes each plan into the same pinned memory, and queues a copy from there: so the host waits until
        the copy of the last one is done, if the device is so far behind.
        """
        self._copied.synchronize()
        for window, wrapper in self.by_window.items():
            # It counts the tokens before a query, and -1 is all of them.
            wrapper.plan(*arguments, window_left=-1 if window is None else window - 1, **options)
        self._copied.record()


class _PlannedWrappers(AttentionBackend):
    """Runs in each layer the wrapper that was planned for the layer's window.

    Keys and values are written into ``cache`` [layers, 2, blocks, block_size, kv_heads, head_dim] by their slots, which
    the batch has anyway.
    """

    def __init__(self, spec: AttentionSpec, cache: torch.Tensor) -> None:
        super().__init__(spec)
        self._cache = cache
        self._by_window: dict[int | None, Any] = {}
        self._slots = torch.empty(0)

    def _plan(self, batch: ForwardBatch, wrappers: _Wrappers, slots: torch.Tensor, decodes: bool) -> None:
        """Plan a step. ``slots``: [T] int64; ``decodes``: they are decode wrappers, which want no rows of queries."""
        self._by_window, self._slots, spec = wrappers.by_window, slots, self.spec
        queries = [] if decodes else [batch.host.query_start_loc.cpu()]
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size)
        arguments = (*queries, *page_table(batch, spec.block_size), *shape)
        options = {"q_data_type": spec.dtype, "kv_data_type": spec.dtype, "sm_scale": spec.softmax_scale}
        if not decodes:
            options["causal"] = True
        wrappers.plan(*arguments, **options)

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        wrapper, (keys, values) = self._by_window[self.spec.window(layer)], self._cache[layer]
        keys.flatten(0, 1)[self._slots] = k
        values.flatten(0, 1)[self._slots] = v
        if sinks is None:
            output: torch.Tensor = wrapper.run(q.contiguous(), (keys, values))
            return output
        output, log_sum = wrapper.run(q.contiguous(), (keys, values), return_lse=True)  # [T, heads], to base 2
        share = torch.sigmoid(log_sum * math.log(2) - sinks.float())  # of a head's attention that is left for the keys
        return (output * share[..., None]).to(q.dtype)


class FlashInferAttention(_PlannedWrappers):
    """One wrapper for each window that layers have is planned per step, and then runs in all of these layers.

    - Every sequence has one token: ``BatchDecodeWithPagedKVCacheWrapper``, on tensor cores because its other kernel
      lacks some group sizes (Qwen2.5-0.5B has 7 query heads to a KV head).
    - Otherwise ``BatchPrefillWithPagedKVCacheWrapper`` for the whole batch, decodes included: its causal mask is
      aligned to the end of the context, as ``ForwardBatch`` is. Splitting the batch would add a second plan, and
      gathers and scatters of queries in each layer.

    Raises:
        ModelError: flashinfer is not installed. What it has no kernel for, ``unsupported_reason`` says before.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        shape = (spec.num_layers, 2, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        super().__init__(spec, torch.zeros(shape, dtype=spec.dtype, device=spec.device))
        flashinfer = _import_flashinfer()
        # Zeros: the decode wrapper wants them. Shared: it holds what a wrapper computes while it runs.
        self._workspace = torch.zeros(ATTENTION_WORKSPACE, dtype=torch.uint8, device=spec.device)
        # As in the graphs and for decodes; left to choose, it takes another kernel on an H100 (fa3), which shares no
        # keys between the query heads of a group.
        prefill = partial(flashinfer.BatchPrefillWithPagedKVCacheWrapper, self._workspace, _LAYOUT, backend="fa2")
        decode = partial(flashinfer.BatchDecodeWithPagedKVCacheWrapper, self._workspace, _LAYOUT, use_tensor_cores=True)
        self._prefill, self._decode = _Wrappers(spec, prefill), _Wrappers(spec, decode)

    def plan(self, batch: ForwardBatch) -> None:
        decodes = len(batch.token_ids) == len(batch.seq_lens)
        self._plan(batch, self._decode if decodes else self._prefill, batch.slot_mapping.long(), decodes)

    def fixed(self, num_tokens: int, max_blocks: int) -> AttentionBackend:
        return _FixedFlashInfer(self.spec, self._cache, self._workspace, num_tokens, max_blocks)


class _FixedFlashInfer(_PlannedWrappers):
    """Prefill wrappers with buffers of their own, which a CUDA graph reads; see ``AttentionBackend.fixed``.

    The first plan tells a wrapper how many query rows there can be, so every plan must have as many. Slots are read
    where they lie at the first plan, as int64.
    """

    def __init__(
        self, spec: AttentionSpec, cache: torch.Tensor, workspace: torch.Tensor, num_tokens: int, max_blocks: int
    ) -> None:
        super().__init__(spec, cache)

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=spec.device)

        self._fixed = _Wrappers(
            spec,
            lambda: _import_flashinfer().BatchPrefillWithPagedKVCacheWrapper(
                workspace,
                _LAYOUT,
                use_cuda_graph=True,
                qo_indptr_buf=buffer(num_tokens + 1),
                paged_kv_indptr_buf=buffer(num_tokens + 1),
                paged_kv_indices_buf=buffer(num_tokens * max_blocks),  # sequences may share blocks
                paged_kv_last_page_len_buf=buffer(num_tokens),
                backend="fa2",  # the kernel that was read for what it does with sequences of no query
            ),
        )

    def plan(self, batch: ForwardBatch) -> None:
        self._plan(batch, self._fixed, batch.slot_mapping, decodes=False)


def _import_flashinfer() -> Any:
    try:
        import flashinfer
    except Exception as error:  # it also makes a directory, and looks at the machine
        raise ModelError(f"flashinfer cannot be imported: {error}") from error
    return flashinfer


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why flashinfer has no kernel for this; None where it has."""
    if spec.device.type != "cuda":
        return f"flashinfer needs a CUDA device, not {spec.device.type}"
    if spec.dtype not in _DTYPES:
        return f"flashinfer computes in float16 and bfloat16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.head_dim not in _HEAD_DIMS:
        return f"head_dim is {spec.head_dim}, and flashinfer has kernels for {', '.join(map(str, _HEAD_DIMS))}"
    if spec.num_heads % spec.num_kv_heads:
        return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} KV heads"
    return None
