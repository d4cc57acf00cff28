"""The target's own choice of token at every row of logits.

A choice is a pure function of prompt, parameters, seed, logits and the tokens before it. Drafts count
as tokens before the later rows of their sequence, so a row decides exactly as it would have alone,
and a draft token is accepted exactly when it is the choice (drafter-invariant verification).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, islice

import msgspec
import torch

from evospec.engine.messages import SamplingParams, TokenLogprob
from evospec.engine.request import Request
from evospec.engine.sampling.choose import SamplingState, all_greedy, row_sampling
from evospec.engine.sampling.gpu_choices import GpuChoices
from evospec.engine.sampling.logprobs import token_logprobs
from evospec.engine.sampling.processors import LogitsEdits
from evospec.engine.step import SampledSequence
from evospec.kernels import choose_tokens as kernel
from evospec.kernels.choose_tokens import RowSampling
from evospec.kernels.native import Team

_NO_TOKEN = -1
"""What is chosen where logits are not finite; no draft is that."""


class SamplingRows(msgspec.Struct, frozen=True):
    """One sequence's rows in the logits of this step.

    There are 1 + len(draft_token_ids) rows; row r is conditioned on the first r drafts. With a grammar, the request's
    cursor knows the masks of all of them.
    """

    request: Request
    draft_token_ids: Sequence[int] = ()


class Sampler:
    """Chooses tokens for whole batches.

    Args:
        eos_token_ids: tokens that end an answer.
        team: threads of the compiled kernels (None: the calling one).
        on_gpu: what chooses where logits are on a GPU (None: they are on the CPU).
    """

    def __init__(
        self, eos_token_ids: Iterable[int], team: Team | None = None, on_gpu: GpuChoices | None = None
    ) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._team, self._on_gpu = team, on_gpu

    def sample(self, logits: torch.Tensor, rows: list[SamplingRows]) -> list[SampledSequence]:
        """Choose a token at every row and accept drafts up to the first that is not the choice.

        Args:
            logits: [L, V] float32, the rows of all sequences in order; the same afterwards.
            rows: one entry per sequence.
        """
        starts = [0, *accumulate([1 + len(sequence.draft_token_ids) for sequence in rows])]
        edits = self._edits(starts, rows, logits.shape[1])
        choices = self._choose(logits, edits, *_sampling_and_positions(rows))
        accepted = [_accept(one.draft_token_ids, choices, start) for one, start in zip(rows, starts, strict=False)]
        are_finite = [kept[-1] != _NO_TOKEN for kept in accepted]
        accepted = [kept if is_finite else kept[:-1] for kept, is_finite in zip(accepted, are_finite, strict=True)]
        logprobs = self._logprobs(logits, starts, rows, accepted)
        return list(map(SampledSequence, accepted, logprobs, are_finite))

    def _edits(self, starts: list[int], rows: list[SamplingRows], vocab_size: int) -> LogitsEdits | None:
        """Of all rows; None: there are none."""
        edits = None
        for start, sequence in zip(starts, rows, strict=False):
            request = sequence.request
            state = request.sampling_state
            if state is None:  # made no earlier: that takes a while for a long prompt
                state = request.sampling_state = SamplingState(request.sampling, request.prompt_token_ids)
            if state.edits_logits:
                edits = edits or LogitsEdits(self._eos_token_ids, starts[-1], vocab_size)
                edits.add_sequence(start, request, sequence.draft_token_ids, state)
        return edits

    def _choose(
        self, logits: torch.Tensor, edits: LogitsEdits | None, sampling: RowSampling | None, positions: Sequence[int]
    ) -> list[int]:
        if self._on_gpu is not None:
            return self._on_gpu.choose(logits, sampling, positions, edits)
        if edits is None:
            return kernel.choose_tokens(logits, sampling, positions, None, None, self._team)
        try:
            edited = edits.apply(logits)
            allowed = None if edits.allowed is None else torch.from_numpy(edits.allowed)
            return kernel.choose_tokens(edited, sampling, positions, None, allowed, self._team)
        finally:
            edits.undo()

    def _logprobs(
        self, logits: torch.Tensor, starts: list[int], rows: list[SamplingRows], accepted: list[list[int]]
    ) -> list[list[TokenLogprob] | None]:
        """Log-probabilities of the accepted tokens of the requests that ask for them, computed together."""
        wanted = [i for i, sequence in enumerate(rows) if sequence.request.sampling.logprobs is not None]
        logprobs: list[list[TokenLogprob] | None] = [None] * len(rows)
        if not wanted:
            return logprobs
        indices = [starts[i] + r for i in wanted for r in range(len(accepted[i]))]
        num_top = [rows[i].request.sampling.logprobs or 0 for i in wanted for _ in accepted[i]]
        token_ids = [token_id for i in wanted for token_id in accepted[i]]
        entries = iter(token_logprobs(logits, indices, token_ids, num_top, self._team))
        for i in wanted:
            logprobs[i] = list(islice(entries, len(accepted[i])))
        return logprobs


def _accept(draft_token_ids: Sequence[int], choices: list[int], start: int) -> list[int]:
    """The choices from ``start`` on, up to and including the first that differs from its draft."""
    end = start + 1
    for draft_token_id in draft_token_ids:
        if choices[end - 1] != draft_token_id:
            break
        end += 1
    return choices[start:end]


def _sampling_and_positions(rows: list[SamplingRows]) -> tuple[RowSampling | None, list[int]]:
    """Of each row of logits: how its token is chosen, and at which position; of greedy rows nobody asks for either."""
    if all_greedy([sequence.request.sampling for sequence in rows]):
        return None, []
    params: list[SamplingParams] = []
    positions: list[int] = []
    for sequence in rows:
        request, count = sequence.request, 1 + len(sequence.draft_token_ids)
        first = len(request.prompt_token_ids) + len(request.output_token_ids)
        params += [request.sampling] * count
        positions += range(first, first + count)
    return row_sampling(params), positions
