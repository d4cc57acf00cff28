"""What stands in the place of networks and of a GPU's graphs in ``benchmarks.common.stubbed_engine``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.batch import Features, ForwardBatch, ForwardOutput
from evospec.engine.models.decoder import HeadSlab
from evospec.kernels.session_memory import DraftedRounds

HIDDEN = 8
"""Width of the hidden states, which nobody multiplies."""

P = ParamSpec("P")
R = TypeVar("R")


class StubTime:
    """Processor time of this thread that went into stubs."""

    seconds = 0.0
    is_running = False


def stub(function: Callable[P, R]) -> Callable[P, R]:
    """Count a function's time in ``StubTime``, once where stubs call each other."""

    @wraps(function)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        if StubTime.is_running:
            return function(*args, **keywords)
        StubTime.is_running, started = True, time.thread_time()
        result = function(*args, **keywords)
        StubTime.seconds += time.thread_time() - started
        StubTime.is_running = False
        return result

    return run


class StubRecorder:
    """In place of a ``CudaGraphRecorder``: a replay runs the function again."""

    def __call__(self, run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        output = run()

        @stub
        def replay() -> None:
            again = run()
            if isinstance(output, ForwardOutput) and isinstance(again, ForwardOutput):
                output.hidden.copy_(again.hidden)
            elif isinstance(output, torch.Tensor) and isinstance(again, torch.Tensor) and output is not again:
                output.copy_(again)

        return replay, output


class StubPrior:
    """In place of a ``GpuPrior``: it prefers what the draft prefers, and tells sessions of candidates."""

    def __init__(self, *_: object) -> None:
        """Of nothing."""

    @stub
    def score(
        self,
        found: tuple[torch.Tensor, torch.Tensor],
        hidden: torch.Tensor,
        of_rows: torch.Tensor,
        drafted: DraftedRounds,
        place: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, token_ids = found
        drafted.token_ids(place).copy_(token_ids)
        drafted.logits(place).copy_(logits)
        drafted.features(place).zero_()
        return logits, token_ids[:, 0]


class StubAttention(AttentionBackend):
    """Attends to nothing, but knows the place in the texts of each token of the batch that it was planned for.

    It knows the text of a sequence by the sequence's first block, since it has read the first token.
    """

    def __init__(self, spec: AttentionSpec, length: int, text_of_block: torch.Tensor | None = None) -> None:
        super().__init__(spec)
        self._length = length
        self._text_of_block = torch.zeros(spec.num_blocks, dtype=torch.int64)
        if text_of_block is not None:
            self._text_of_block = text_of_block

    def plan(self, batch: ForwardBatch) -> None:
        self._batch = batch.host

    def fixed(self, num_tokens: int, max_blocks: int) -> StubAttention:
        return StubAttention(self.spec, self._length, self._text_of_block)

    @stub
    def forward(self, *_: object) -> torch.Tensor:
        """[T, HIDDEN] hidden states."""
        batch = self._batch
        lengths = batch.query_start_loc.diff().long()
        first_block = batch.block_tables[:, 0].long().repeat_interleave(lengths)
        is_first = batch.positions == 0
        self._text_of_block[first_block[is_first]] = batch.token_ids[is_first].long()
        hidden = torch.zeros(len(batch.positions), HIDDEN)
        hidden[:, 0] = self._text_of_block[first_block] * self._length + batch.positions
        return hidden


_NOTHING = torch.empty(0)


class StubTarget:
    """A ``CausalLM``."""

    weight_bytes = 0

    def __init__(self, vocab_size: int) -> None:
        self._logits = torch.empty(0, vocab_size)

    @stub
    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        attention.plan(batch)
        hidden = attention.forward(0, _NOTHING, _NOTHING, _NOTHING)
        return ForwardOutput(hidden, hidden if capture else None)

    @stub
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(token_ids), HIDDEN)

    @stub
    def compute_logits(self, hidden: torch.Tensor, only_largest: bool = False) -> torch.Tensor:
        """Of the right shape, in memory that nobody touches but for the first column, and that is used again."""
        if len(hidden) > len(self._logits):
            self._logits = torch.empty(2 * len(hidden), self._logits.shape[1])
        logits = self._logits[: len(hidden)]
        logits[:, 0] = hidden[:, 0]
        return logits

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        rows = torch.zeros(self._logits.shape[1] if token_ids is None else len(token_ids), HIDDEN)
        return HeadSlab(lambda hidden: hidden, 0, rows)

    @stub
    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(token_ids), HIDDEN)


class StubEagle:
    """An ``EagleNetwork``."""

    shift = weight_bytes = 0

    def load(self, weights: object) -> None:
        raise NotImplementedError

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def fuse_into(self, store: torch.Tensor, features: Features) -> None:
        """Nobody reads what would be stored."""

    @stub
    def forward(self, batch: ForwardBatch, attention: AttentionBackend, *_: object) -> torch.Tensor:
        attention.plan(batch)
        return attention.forward(0, _NOTHING, _NOTHING, _NOTHING)[batch.logits_indices]

    def head_input(self, a: torch.Tensor) -> torch.Tensor:
        return a
