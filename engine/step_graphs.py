"""Steps of few tokens as CUDA graphs: one launch instead of several hundred, which is most of such a step's time.

A graph computes a fixed number of tokens. A step is padded to the next size: each token that is too many is a sequence
of its own, in a block that belongs to nobody. So one graph serves decodes and verifications of any mixture.

NOT RUN on a GPU so far (docs/decisions/006-cuda-graphs.md): what is padded, and what comes out, is tested on a CPU with
steps that are computed anew where a graph would be replayed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from evospec.engine.attention.base import AttentionBackend
from evospec.engine.batch import FlatTokens, ForwardBatch, ForwardOutput, padded_block_tables
from evospec.engine.gpu_memory import GRAPH_SIZES
from evospec.engine.loader import CausalLM
from evospec.kernels.upload import FixedMemory

_WARM_UPS = 2
"""Runs before a capture: libraries allocate in their first."""

_Output = TypeVar("_Output")
Replay = Callable[[], None]
Recorder = Callable[[Callable[[], ForwardOutput]], tuple[Replay, ForwardOutput]]
"""Runs a function, and gives what computes its output anew in place, and that output."""


class CudaGraphRecorder:
    """Captures what a function launches. Graphs share their memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One: each has a workspace of cuBLAS's for good.
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], _Output]) -> tuple[Replay, _Output]:
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads do, such as to share memory with the worker, is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output


def padded(flat: FlatTokens, size: int, spare_block: int, block_size: int) -> ForwardBatch:
    """A batch on the CPU of ``size`` tokens, sequences and rows whose logits are wanted, the given ones first.

    Further tokens, which are added to the lists, are sequences of one token in ``spare_block``; sequences further than
    those have no token. There are no more sequences than tokens, so there is one for each.
    """
    token_ids, positions, ends, seq_lens, block_ids, slots, wanted = flat
    num_missing = size - len(token_ids)
    ends += range(len(token_ids) + 1, size + 1)
    ends += [size] * (size + 1 - len(ends))
    token_ids += [0] * num_missing
    positions += [0] * num_missing
    slots += [spare_block * block_size] * num_missing
    seq_lens += [1] * (size - len(seq_lens))
    wanted += [0] * (size - len(wanted))
    return flat.batch(filled_up(padded_block_tables(block_ids), size, spare_block))


def filled_up(rows: NDArray[Any], size: int, value: int) -> NDArray[Any]:
    """[size, ...]: these rows, and others that hold ``value``."""
    filled = np.full((size, *rows.shape[1:]), value, rows.dtype)
    filled[: len(rows)] = rows
    return filled


class Planned(AttentionBackend):
    """A backend that was planned before: a graph holds what a model launches, and a plan is made on the CPU."""

    def __init__(self, backend: AttentionBackend) -> None:
        super().__init__(backend.spec)
        self._backend = backend

    def plan(self, batch: ForwardBatch) -> None:
        """Nothing."""

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._backend.forward(layer, q, k, v, sinks)


@dataclass(frozen=True)
class _Graph:
    """A recorded step and the memory that it reads."""

    attention: AttentionBackend
    memory: FixedMemory
    replay: Replay
    output: ForwardOutput


class StepGraphs:
    """Runs a model's steps, by graphs where they are small. A graph is recorded when a step of its size first comes.

    Args:
        model: computes on the backend's device.
        attention: owns the cache, whose last block no sequence uses; it must have a ``fixed`` form.
        max_blocks: of a sequence.
        record: in place of a ``CudaGraphRecorder``, where there is no GPU.
    """

    def __init__(
        self, model: CausalLM, attention: AttentionBackend, max_blocks: int, record: Recorder | None = None
    ) -> None:
        self._model, self._attention, self._max_blocks = model, attention, max_blocks
        self._record = record or CudaGraphRecorder()
        self._spare_block = attention.spec.num_blocks - 1
        self._graphs: dict[tuple[int, tuple[int, ...]], _Graph] = {}

    def forward(self, flat: FlatTokens, capture: Sequence[int] = ()) -> tuple[ForwardOutput, ForwardBatch]:
        """As the model's ``forward``, of tokens that may be padded in place.

        Returns:
            the output, and the batch's flat tensors on the device; both are valid until the next step.
        """
        num_tokens, num_wanted, spec = len(flat.token_ids), len(flat.logits_indices), self._attention.spec
        if num_tokens > GRAPH_SIZES[-1]:
            batch = flat.batch(padded_block_tables(flat.block_ids)).on(spec.device)
            return self._model.forward(batch, self._attention, capture), batch
        size = GRAPH_SIZES[bisect_left(GRAPH_SIZES, num_tokens)]
        more = padded(flat, size, self._spare_block, spec.block_size)
        graph = self._graphs.get((size, tuple(capture)))
        if graph is None:
            graph = self._graphs[size, tuple(capture)] = self._make(more, capture)
        graph.memory.write(*read_by_graphs(more))
        placed = _on_device(more, graph.memory)
        graph.attention.plan(placed)
        graph.replay()  # after recording too: a capture computes nothing
        hidden, features = graph.output.hidden[:num_tokens], graph.output.features
        wanted, slots = placed.logits_indices[:num_wanted], placed.slot_mapping[:num_tokens]
        output = ForwardOutput(hidden, None if features is None else features[:num_tokens])
        return output, replace(placed, logits_indices=wanted, slot_mapping=slots)

    def _make(self, batch: ForwardBatch, capture: Sequence[int]) -> _Graph:
        attention = self._attention.fixed(len(batch.token_ids), self._max_blocks)
        memory = FixedMemory(self._attention.spec.device, *read_by_graphs(batch))
        own = _on_device(batch, memory)
        attention.plan(own)
        replay, output = self._record(lambda: self._model.forward(own, Planned(attention), capture))
        return _Graph(attention, memory, replay, output)


def read_by_graphs(batch: ForwardBatch) -> list[NDArray[Any]]:
    """What a graph reads of a batch, slots as int64; the rest is in the plan of its attention."""
    read = batch.token_ids, batch.positions, batch.slot_mapping.long(), batch.logits_indices
    return [tensor.numpy() for tensor in read]


def _on_device(batch: ForwardBatch, memory: FixedMemory) -> ForwardBatch:
    token_ids, positions, slots, wanted = memory.tensors
    return replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slots,
        logits_indices=wanted,
        on_host=batch,
    )
