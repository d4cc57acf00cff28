"""The target's choice of tokens on a GPU: what logits of a step say, cut off and with noise, in one CUDA graph.

NOT RUN on a GPU so far (docs/decisions/006-cuda-graphs.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from evospec.engine.gpu_memory import GRAPH_SIZES
from evospec.engine.sampling.processors import LogitsEdits
from evospec.engine.step_graphs import CudaGraphRecorder, Replay
from evospec.kernels.choose_tokens import UNDECIDED, GpuRows, RowSampling, choice_arrays, choose_tokens, launch_choice
from evospec.kernels.logits_edits import edit_on_gpu
from evospec.kernels.upload import FixedMemory


@dataclass(frozen=True)
class _Graph:
    """A recorded choice and the memory that it reads."""

    memory: FixedMemory
    replay: Replay
    output: torch.Tensor


class GpuChoices:
    """Chooses from a copy of the logits, which edits may change: nobody has to put back what was there.

    ``has_graphs``: whether few rows are chosen by graphs.
    """

    def __init__(self, vocab_size: int, device: torch.device, *, has_graphs: bool) -> None:
        self._logits = torch.empty(GRAPH_SIZES[-1] if has_graphs else 0, vocab_size, device=device)
        self._record = CudaGraphRecorder() if has_graphs else None
        self._graphs: dict[tuple[int, bool, bool], _Graph] = {}

    def choose(
        self, logits: torch.Tensor, sampling: RowSampling | None, positions: Sequence[int], edits: LogitsEdits | None
    ) -> list[int]:
        """As ``kernels.choose_tokens`` of the edited ``logits`` [L, V] float32, which are the same afterwards."""
        is_small = len(logits) <= len(self._logits)
        ours = self._logits[: len(logits)].copy_(logits) if is_small else logits.clone()
        if edits is not None:
            edit_on_gpu(ours, edits.sparse(), edits.allowed)
        if is_small:
            tokens = self._replay(len(logits), sampling, positions)
            if UNDECIDED not in tokens:
                return tokens
        return choose_tokens(ours, sampling, positions)

    def _replay(self, count: int, sampling: RowSampling | None, positions: Sequence[int]) -> list[int]:
        """Of the first rows of our logits."""
        size = GRAPH_SIZES[bisect_left(GRAPH_SIZES, count)]
        arrays: list[NDArray[Any]] = []
        if sampling is not None:
            arrays = choice_arrays(sampling.padded(size), [*positions, *[0] * (size - count)])
        key = size, sampling is not None, sampling is not None and sampling.is_truncated
        if key not in self._graphs:
            self._graphs[key] = self._make(size, arrays, is_truncated=key[2])
        graph = self._graphs[key]
        if arrays:
            graph.memory.write(*arrays)
        graph.replay()
        tokens: list[int] = graph.output[:count].tolist()
        return tokens

    def _make(self, size: int, arrays: list[NDArray[Any]], *, is_truncated: bool) -> _Graph:
        assert self._record is not None
        memory, logits = FixedMemory(self._logits.device, *arrays), self._logits[:size]
        rows = GpuRows.of(memory.tensors[:4], memory.tensors[4]) if arrays else None
        return _Graph(memory, *self._record(lambda: launch_choice(logits, rows, is_truncated=is_truncated)))
