"""The target's own choice of token at every row of logits.

A choice is a pure function of prompt, parameters, seed, logits and the tokens before it. Drafts count
as tokens before the later rows of their sequence, so a row decides exactly as it would have alone,
and a draft token is accepted exactly when it is the choice (drafter-invariant verification).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.messages import SamplingParams, TokenLogprob
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.logprobs import token_logprobs
from engine.sampling.processors import LogitsEdits
from engine.sampling.state import SamplingState
from engine.sampling.truncated import is_truncated, truncated_argmax
from kernels.argmax import argmax_rows
from kernels.gumbel_argmax import gumbel_argmax, seeds_tensor

if TYPE_CHECKING:
    from engine.request import Request


# Dividing logits by less could overflow float32; the distribution is a single token long before.
_MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingRows:
    """One sequence's rows in the logits of this step.

    There are 1 + len(draft_token_ids) rows; row r is conditioned on the first r drafts.
    """

    request: Request
    draft_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class SampledSequence:
    """Accepted drafts, then one recovered or bonus token; logprobs where the request asks for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True)
class _Row:
    """One row of logits: whose it is and the position of the token it chooses."""

    params: SamplingParams
    position: int

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < _MIN_TEMPERATURE


class Sampler:
    """Chooses tokens for whole batches and keeps each request's sampling state until ``forget``."""

    def __init__(self, eos_token_ids: Iterable[int], grammars: GrammarCompiler) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._grammars = grammars
        self._states: dict[str, SamplingState] = {}

    def add(self, request: Request) -> None:
        """Prepare for a new request.

        Waits until its grammar is compiled: begin that with ``GrammarCompiler.compile`` beforehand and add
        the request when it is done.

        Raises:
            GrammarError: the grammar cannot be compiled.
        """
        params = request.sampling
        matcher = self._grammars.compile(params.grammar).result().matcher() if params.grammar is not None else None
        self._states[request.request_id] = SamplingState(params, request.prompt_token_ids, matcher)

    def forget(self, request_id: str) -> None:
        """Drop a finished or aborted request's state."""
        self._states.pop(request_id, None)

    def sample(self, logits: torch.Tensor, rows: list[SamplingRows]) -> list[SampledSequence]:
        """Choose a token at every row and accept drafts up to the first that is not the choice.

        Args:
            logits: [L, V] float32, the rows of all sequences in order; not changed.
            rows: one entry per sequence; every request was given to ``add``.
        """
        processed = self._process(logits, rows)
        choices = _choose(processed, _flatten(rows))
        sampled = []
        start = 0
        for sequence in rows:
            end = start + 1 + len(sequence.draft_token_ids)
            token_ids = _accept(sequence.draft_token_ids, choices[start:end])
            logprobs = None
            if (num_top := sequence.request.sampling.logprobs) is not None:
                logprobs = token_logprobs(logits[start : start + len(token_ids)], token_ids, num_top)
            sampled.append(SampledSequence(token_ids, logprobs))
            start = end
        return sampled

    def _process(self, logits: torch.Tensor, rows: list[SamplingRows]) -> torch.Tensor:
        """Logits after min_tokens, grammar, bias and penalties; the same tensor where none applies."""
        edits = LogitsEdits(self._eos_token_ids, vocab_size=logits.shape[1])
        start = 0
        for sequence in rows:
            state = self._states[sequence.request.request_id]
            edits.add_sequence(start, sequence.request, sequence.draft_token_ids, state)
            start += 1 + len(sequence.draft_token_ids)
        return edits.apply(logits)


def _accept(draft_token_ids: tuple[int, ...], choices: list[int]) -> list[int]:
    """The choices up to and including the first that differs from its draft, or all of them."""
    for index, draft_token_id in enumerate(draft_token_ids):
        if choices[index] != draft_token_id:
            return choices[: index + 1]
    return choices


def _flatten(rows: list[SamplingRows]) -> list[_Row]:
    flat = []
    for sequence in rows:
        request = sequence.request
        first = len(request.prompt_token_ids) + len(request.output_token_ids)
        flat += [_Row(request.sampling, first + r) for r in range(1 + len(sequence.draft_token_ids))]
    return flat


def _choose(logits: torch.Tensor, rows: list[_Row]) -> list[int]:
    """Greedy rows by one argmax; the others by Gumbel argmax, of the surviving tokens only where truncated."""
    plain = [i for i, row in enumerate(rows) if not row.is_greedy and not is_truncated(row.params)]
    truncated = [i for i, row in enumerate(rows) if not row.is_greedy and is_truncated(row.params)]
    num_greedy = len(rows) - len(plain) - len(truncated)
    choices = argmax_rows(logits) if num_greedy else [0] * len(rows)
    for indices in (plain, truncated):
        if indices:
            group = logits if len(indices) == len(rows) else logits[indices]
            for i, token_id in zip(indices, _choose_at_random(group, [rows[i] for i in indices]), strict=True):
                choices[i] = token_id
    return choices


def _choose_at_random(logits: torch.Tensor, rows: list[_Row]) -> list[int]:
    """Rows with a temperature, either all truncated or none."""
    params = [row.params for row in rows]
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=logits.device)
    scaled = logits / temperatures.unsqueeze(1)
    seeds = seeds_tensor([p.seed for p in params], logits.device)
    positions = torch.tensor([row.position for row in rows], dtype=torch.int64, device=logits.device)
    if is_truncated(params[0]):
        return truncated_argmax(scaled, seeds, positions, params).tolist()
    return gumbel_argmax(scaled, seeds, positions).tolist()
