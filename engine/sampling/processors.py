"""Changes to logits before temperature: min_tokens, logit_bias, penalties, in that order; and grammars.

The edits of all rows of a step are gathered first and applied together: a few writes for the whole batch, which touch
only the tokens concerned. What a grammar forbids is never written: it is a bit mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request
from evospec.engine.sampling.choose import FloatArray, IdArray, SamplingState
from evospec.kernels.logits_edits import SparseEdits
from evospec.kernels.penalties import SeenTokens, penalize, put_back, sparse_edits

_Index = tuple[torch.Tensor, ...]
_SparseEdit = tuple[int, IdArray, FloatArray]
"""A row, distinct tokens, and their values."""


class LogitsEdits:
    """The edits of one step. ``add_sequence`` for each sequence, then ``apply`` once, and ``undo``.

    ``allowed``: bits of the tokens that grammars allow, [num_rows, ceil(V / 32)]; None: no grammar.
    """

    def __init__(self, eos_token_ids: frozenset[int], num_rows: int, vocab_size: int) -> None:
        self.allowed: NDArray[np.int32] | None = None
        self._eos_token_ids = eos_token_ids
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._bans: list[_SparseEdit] = []
        self._biases: list[_SparseEdit] = []
        self._seen = SeenTokens()
        self._undo: list[Callable[[], object]] = []

    def add_sequence(self, start: int, request: Request, draft_token_ids: Sequence[int], state: SamplingState) -> None:
        """Gather the edits of one sequence's rows, the first of which is row ``start``.

        If the request has a grammar, its masks for all these rows are known.
        """
        state.commit(request.output_token_ids)
        params, num_output = request.sampling, len(request.output_token_ids)
        for index, row in enumerate(range(start, start + len(draft_token_ids) + 1)):
            if index:
                state.add(draft_token_ids[index - 1])
            if request.grammar is not None:
                self._add_mask(row, request.grammar.masks[index])
            if num_output + index < params.min_tokens:
                self._add_bans(row, params)
            if state.bias is not None:
                self._biases.append((row, *state.bias))
            if state.has_penalties:
                self._seen.add(row, state.penalties, state.num_prompt, state.token_ids, state.counts)
        for token_id in draft_token_ids:
            state.add(token_id, -1)

    def _add_bans(self, row: int, params: SamplingParams) -> None:
        """Of what ends the output; where a grammar allows nothing else, it outranks min_tokens."""
        end_token_ids = self._eos_token_ids.union(params.stop_token_ids)
        token_ids = np.array([i for i in end_token_ids if i < self._vocab_size], dtype=np.int64)
        if self.allowed is None or not _only(self.allowed[row], token_ids):
            self._bans.append((row, token_ids, np.full(len(token_ids), -np.inf, dtype=np.float32)))

    def _add_mask(self, row: int, mask: NDArray[np.int32]) -> None:
        if self.allowed is None:
            self.allowed = np.full((self._num_rows, -(-self._vocab_size // 32)), -1, dtype=np.int32)  # all ones
        self.allowed[row] = mask

    def sparse(self) -> list[SparseEdits]:
        """All but the masks, for a GPU; one after the other."""
        edits = [_as_sparse(edits) for edits in (self._bans, self._biases) if edits]
        return [*edits, sparse_edits(self._seen)] if self._seen else edits

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The edited ``logits`` [L, V] float32 of a CPU, until ``undo``.

        Edited in place and put back: megabytes are not copied for the sake of some tokens.
        """
        logits = logits.contiguous()  # rows of an expanded tensor are one
        if self._bans:
            self._put(logits, *_joined(self._bans))
        if self._biases:
            index, values = _joined(self._biases)
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


def _joined(edits: list[_SparseEdit]) -> tuple[_Index, torch.Tensor]:
    """The index (rows, token ids) and the values of all."""
    sparse = _as_sparse(edits)
    rows = np.repeat(sparse.rows, np.diff(sparse.ends, prepend=0))
    return (torch.from_numpy(rows), torch.from_numpy(sparse.token_ids)), torch.from_numpy(sparse.addends)


def _as_sparse(edits: list[_SparseEdit]) -> SparseEdits:
    """Values that are added."""
    rows, of_rows, values = zip(*edits, strict=True)
    token_ids = np.concatenate(of_rows)
    ones = np.ones(len(token_ids), np.float32)
    return SparseEdits(np.array(rows), np.cumsum([*map(len, of_rows)]), token_ids, ones, np.concatenate(values))


def _only(allowed: NDArray[np.int32], token_ids: IdArray) -> bool:
    """Whether the bits [ceil(V / 32)] are of some of these tokens and of no others."""
    words = allowed.view(np.uint32).copy()
    np.bitwise_and.at(words, token_ids // 32, ~(np.uint32(1) << (token_ids % 32).astype(np.uint32)))
    return not words.any()
