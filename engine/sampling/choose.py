"""How requests' parameters say that tokens are chosen, and what of their texts that takes into account."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.messages import SamplingParams
from evospec.kernels import choose_tokens as kernel
from evospec.kernels.choose_tokens import RowSampling
from evospec.kernels.native import Team
from evospec.kernels.penalties import IntArray

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]

_MIN_TEMPERATURE = 1e-5
"""Less counts as 0: dividing logits by it could overflow float32, and only the largest has a chance long before."""


def is_greedy(params: SamplingParams) -> bool:
    """Whether the largest logit is taken."""
    return params.temperature < _MIN_TEMPERATURE


def edits_logits(params: SamplingParams) -> bool:
    """Whether anything of them changes logits before a token is chosen."""
    return bool(params.grammar or has_penalties(params) or params.logit_bias or params.min_tokens)


def has_penalties(params: SamplingParams) -> bool:
    """Whether the tokens so far change logits."""
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)


def takes_largest_logit(params: SamplingParams) -> bool:
    """Whether the largest logit is taken as it is, and nobody asks for others."""
    wants_others = params.logprobs is not None or params.prompt_logprobs is not None
    return is_greedy(params) and not wants_others and not edits_logits(params)


def all_greedy(params: Sequence[SamplingParams]) -> bool:
    """Whether every row takes its largest logit."""
    return max([one.temperature for one in params], default=0.0) < _MIN_TEMPERATURE


def row_sampling(params: Sequence[SamplingParams]) -> RowSampling | None:
    """The same for the kernels, one entry a row; None: all greedy."""
    if all_greedy(params):
        return None
    return RowSampling(
        temperatures=[0.0 if is_greedy(p) else p.temperature for p in params],
        seeds=[p.seed for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
    )


def choose_tokens(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    token_ids: torch.Tensor | None = None,
    team: Team | None = None,
    allowed: torch.Tensor | None = None,
) -> list[int]:
    """As ``kernels.choose_tokens``, by parameters whose temperature, seed, top_k, top_p and min_p count, one a row."""
    return kernel.choose_tokens(logits, row_sampling(params), positions, token_ids, allowed, team)


class SamplingState:
    """What sampling remembers of one request: how often each token occurs in its output, for penalties.

    It follows the committed tokens (``commit``) and can be moved along a draft and back (``add``), so that each row of
    a verification sees the history it would have had alone.

    Attributes:
        edits_logits: whether anything of the request changes logits.
        penalties: for repetition, presence and frequency.
        has_penalties: whether the tokens so far change logits; without, nothing is counted.
        num_prompt: how many of ``token_ids``, the first, are the prompt's.
        token_ids: distinct tokens, so that penalties touch those and never the vocabulary.
        counts: of each in the output: 0 for some of the prompt, and for drafts that were taken back.
        bias: the tokens of logit_bias and what is added to them; None without.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int]) -> None:
        self.penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.has_penalties, self.edits_logits = has_penalties(params), edits_logits(params)
        self.bias: tuple[IdArray, FloatArray] | None = None
        if biases := params.logit_bias:
            self.bias = np.fromiter(biases, np.int64), np.fromiter(biases.values(), np.float32)
        counted = prompt_token_ids if params.repetition_penalty != 1.0 else []
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(counted))}
        self.num_prompt = len(self._slots)
        self.token_ids: IntArray = array("q", self._slots)
        self.counts: IntArray = array("q", bytes(8 * self.num_prompt))
        self._num_committed = 0

    def commit(self, output_token_ids: list[int]) -> None:
        """Follow the output up to its end; it only ever grows, also across a preemption."""
        for token_id in output_token_ids[self._num_committed :]:
            self.add(token_id)
        self._num_committed = len(output_token_ids)

    def add(self, token_id: int, times: int = 1) -> None:
        """Count ``times`` more occurrences of a token after those so far (-1 takes one back)."""
        if not self.has_penalties:
            return
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self.token_ids):
            self.token_ids.append(token_id)
            self.counts.append(0)
        self.counts[slot] += times
