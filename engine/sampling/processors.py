"""Changes to logits before temperature: min_tokens, logit_bias, penalties, in that order; and grammars.

The edits of all rows of a step are gathered first and applied together: a few writes for the whole batch, which touch
only the tokens concerned. What a grammar forbids is never written: it is a bit mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from engine.messages import SamplingParams
from engine.sampling.state import SamplingState
from kernels.penalties import SeenTokens, penalize, put_back

if TYPE_CHECKING:
    from engine.request import Request

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]
_Index = tuple[torch.Tensor, ...]


class _SparseEdits:
    """Values for (row, token) pairs of many rows."""

    def __init__(self) -> None:
        self._rows: list[IdArray] = []
        self._token_ids: list[IdArray] = []
        self._values: list[FloatArray] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, token_ids: IdArray, values: FloatArray) -> None:
        """``token_ids`` are distinct, ``values`` of the same length."""
        self._rows.append(np.full(len(token_ids), row, dtype=np.int64))
        self._token_ids.append(token_ids)
        self._values.append(values)

    def tensors(self, device: torch.device) -> tuple[_Index, torch.Tensor]:
        """The index (rows, token ids) and the values."""
        rows, token_ids, values = (np.concatenate(part) for part in (self._rows, self._token_ids, self._values))
        index = torch.from_numpy(rows).to(device), torch.from_numpy(token_ids).to(device)
        return index, torch.from_numpy(values).to(device)


class LogitsEdits:
    """The edits of one step. ``add_sequence`` for each sequence, then ``apply`` once, and ``undo``.

    ``allowed``: bits of the tokens that grammars allow, [num_rows, ceil(V / 32)]; None: no grammar.
    """

    def __init__(self, eos_token_ids: frozenset[int], num_rows: int, vocab_size: int) -> None:
        self.allowed: NDArray[np.int32] | None = None
        self._eos_token_ids = eos_token_ids
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._bans = _SparseEdits()
        self._biases = _SparseEdits()
        self._seen = SeenTokens()
        self._undo: list[Callable[[], object]] = []

    def add_sequence(
        self, start: int, request: Request, draft_token_ids: tuple[int, ...], state: SamplingState
    ) -> None:
        """Gather the edits of one sequence's rows, the first of which is row ``start``.

        If the request has a grammar, its masks for all these rows are known.
        """
        if not state.edits_logits:
            return
        state.commit(request.output_token_ids)
        num_output = len(request.output_token_ids)
        for index in range(len(draft_token_ids) + 1):
            if index:
                state.advance(draft_token_ids[index - 1])
            if request.grammar is not None:
                self._add_mask(start + index, request.grammar.masks[index])
            self._add_row(start + index, request.sampling, num_output + index, state)
        state.rewind(draft_token_ids)

    def _add_row(self, row: int, params: SamplingParams, num_output: int, state: SamplingState) -> None:
        if num_output < params.min_tokens:
            self._add_bans(row, params)
        if params.logit_bias:
            token_ids = np.fromiter(params.logit_bias, dtype=np.int64)
            self._biases.add(row, token_ids, np.fromiter(params.logit_bias.values(), dtype=np.float32))
        if state.counts is not None:
            penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            seen = state.counts
            self._seen.add(row, penalties, seen.num_prompt, seen.token_ids, seen.counts)

    def _add_bans(self, row: int, params: SamplingParams) -> None:
        """Of what ends the output; where a grammar allows nothing else, it outranks min_tokens."""
        end_token_ids = self._eos_token_ids.union(params.stop_token_ids)
        token_ids = np.array([i for i in end_token_ids if i < self._vocab_size], dtype=np.int64)
        if self.allowed is None or not _only(self.allowed[row], token_ids):
            self._bans.add(row, token_ids, np.full(len(token_ids), -np.inf, dtype=np.float32))

    def _add_mask(self, row: int, mask: NDArray[np.int32]) -> None:
        if self.allowed is None:
            self.allowed = np.full((self._num_rows, -(-self._vocab_size // 32)), -1, dtype=np.int32)  # all ones
        self.allowed[row] = mask

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The edited ``logits`` [L, V] float32, until ``undo``.

        Edited in place and put back: megabytes are not copied for the sake of some tokens.
        """
        logits = logits.contiguous()  # rows of an expanded tensor are one
        if self._bans:
            self._put(logits, *self._bans.tensors(logits.device))
        if self._biases:
            index, values = self._biases.tensors(logits.device)
            self._put(logits, index, logits[index] + values)
        if self._seen:
            self._undo.append(partial(put_back, logits, self._seen, penalize(logits, self._seen)))
        return logits

    def undo(self) -> None:
        """Take back what ``apply`` changed, also where it failed on the way."""
        while self._undo:  # the last first
            self._undo.pop()()

    def _put(self, logits: torch.Tensor, index: _Index, values: torch.Tensor) -> None:
        self._undo.append(partial(logits.__setitem__, index, logits[index]))
        logits[index] = values


def _only(allowed: NDArray[np.int32], token_ids: IdArray) -> bool:
    """Whether the bits [ceil(V / 32)] are of some of these tokens and of no others."""
    words = allowed.view(np.uint32).copy()
    np.bitwise_and.at(words, token_ids // 32, ~(np.uint32(1) << (token_ids % 32).astype(np.uint32)))
    return not words.any()
