"""Changes to logits before temperature: min_tokens, logit_bias, penalties, in that order; and grammars.

The edits of all rows of a step are gathered first and applied together: a few writes for the whole batch, which touch
only the tokens concerned. What a grammar forbids is never written: it is a bit mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import xgrammar

from engine.messages import SamplingParams
from engine.sampling.grammar import GrammarMatcher
from engine.sampling.state import SamplingState, TokenCounts
from kernels.penalties import IntArray, SeenTokens, penalize, put_back

if TYPE_CHECKING:
    from engine.request import Request

FloatArray = npt.NDArray[np.float32]
_Index = tuple[torch.Tensor, ...]


class _SparseEdits:
    """Values for (row, token) pairs of many rows."""

    def __init__(self) -> None:
        self._rows: list[IntArray] = []
        self._token_ids: list[IntArray] = []
        self._values: list[FloatArray] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, token_ids: IntArray, values: FloatArray) -> None:
        """``token_ids`` are distinct, ``values`` of the same length."""
        self._rows.append(np.full(len(token_ids), row, dtype=np.int64))
        self._token_ids.append(token_ids)
        self._values.append(values)

    def tensors(self, device: torch.device) -> tuple[_Index, torch.Tensor]:
        """The index (rows, token ids) and the values."""
        rows, token_ids, values = (np.concatenate(part) for part in (self._rows, self._token_ids, self._values))
        index = torch.from_numpy(rows).to(device), torch.from_numpy(token_ids).to(device)
        return index, torch.from_numpy(values).to(device)


class _Seen:
    """The tokens before many rows that have penalties."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._num_prompt: list[int] = []
        self._penalties: list[tuple[float, float, float]] = []
        self._arrays: list[tuple[IntArray, IntArray]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, params: SamplingParams, counts: TokenCounts) -> None:
        self._rows.append(row)
        self._num_prompt.append(counts.num_prompt)
        self._penalties.append((params.repetition_penalty, params.presence_penalty, params.frequency_penalty))
        self._arrays.append(counts.arrays())

    def tokens(self) -> SeenTokens:
        token_ids, counts = map(np.concatenate, zip(*self._arrays, strict=True))
        ends = list(accumulate(len(token_ids) for token_ids, _ in self._arrays))
        rows, ends_array, num_prompt = np.array([self._rows, ends, self._num_prompt], dtype=np.int64)
        penalties = np.array(self._penalties, dtype=np.float64)
        return SeenTokens(rows, ends_array, num_prompt, penalties, token_ids, counts)


class LogitsEdits:
    """The edits of one step. ``add_sequence`` for each sequence, then ``applied`` once.

    ``allowed``: bits of the tokens that grammars allow, [num_rows, ceil(V / 32)] int32 on the CPU; None: no grammar.
    ``dead_ends``: rows in which a grammar allows nothing, or contradicts itself, so that no choice is right.
    """

    def __init__(self, eos_token_ids: frozenset[int], num_rows: int, vocab_size: int) -> None:
        self.allowed: torch.Tensor | None = None
        self.dead_ends: set[int] = set()
        self._eos_token_ids = eos_token_ids
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._bans = _SparseEdits()
        self._biases = _SparseEdits()
        self._seen = _Seen()

    def add_sequence(
        self, start: int, request: Request, draft_token_ids: tuple[int, ...], state: SamplingState
    ) -> None:
        """Gather the edits of one sequence's rows, the first of which is row ``start``.

        Rows after a draft that the grammar forbids get none: that draft is not chosen, so they are not used.
        """
        if not state.edits_logits:
            return
        if not state.commit(request.output_token_ids):
            self.dead_ends.add(start)  # ends this request, instead of the step for all
            return
        num_output = len(request.output_token_ids)
        self._add_row(start, request.sampling, num_output, state)
        taken = 0
        for draft_token_id in draft_token_ids:
            if not state.advance(draft_token_id):
                break
            taken += 1
            self._add_row(start + taken, request.sampling, num_output + taken, state)
        state.rewind(draft_token_ids[:taken])

    def _add_row(self, row: int, params: SamplingParams, num_output: int, state: SamplingState) -> None:
        if state.matcher is not None:
            self._add_grammar(row, state.matcher)
        if num_output < params.min_tokens:
            self._add_bans(row, params)
        if params.logit_bias:
            token_ids = np.fromiter(params.logit_bias, dtype=np.int64)
            self._biases.add(row, token_ids, np.fromiter(params.logit_bias.values(), dtype=np.float32))
        if state.counts is not None:
            self._seen.add(row, params, state.counts)

    def _add_bans(self, row: int, params: SamplingParams) -> None:
        """Of what ends the output; where a grammar allows nothing else, it outranks min_tokens."""
        end_token_ids = self._eos_token_ids.union(params.stop_token_ids)
        token_ids = np.array([i for i in end_token_ids if i < self._vocab_size], dtype=np.int64)
        if self.allowed is None or not _only(self.allowed[row], token_ids):
            self._bans.add(row, token_ids, np.full(len(token_ids), -np.inf, dtype=np.float32))

    def _add_grammar(self, row: int, matcher: GrammarMatcher) -> None:
        if self.allowed is None:
            self.allowed = xgrammar.allocate_token_bitmask(self._num_rows, self._vocab_size)  # all ones
        matcher.fill_bitmask(self.allowed[row : row + 1])
        if not self.allowed[row].numpy().any():
            self.dead_ends.add(row)

    @contextmanager
    def applied(self, logits: torch.Tensor) -> Iterator[torch.Tensor]:
        """The edited ``logits`` [L, V] float32, within the block.

        Edited in place and put back: megabytes are not copied for the sake of some tokens.
        """
        logits = logits.contiguous()  # rows of an expanded tensor are one
        with ExitStack() as undo:  # the last first
            self._write(logits, undo)
            yield logits

    def _write(self, logits: torch.Tensor, undo: ExitStack) -> None:
        if self._bans:
            _put(logits, *self._bans.tensors(logits.device), undo)
        if self._biases:
            index, values = self._biases.tensors(logits.device)
            _put(logits, index, logits[index] + values, undo)
        if self._seen:
            seen = self._seen.tokens()
            undo.callback(put_back, logits, seen, penalize(logits, seen))


def _put(tensor: torch.Tensor, index: _Index, values: torch.Tensor, undo: ExitStack) -> None:
    """Write, and have ``undo`` take it back."""
    undo.callback(tensor.__setitem__, index, tensor[index])
    tensor[index] = values


def _only(allowed: torch.Tensor, token_ids: IntArray) -> bool:
    """Whether the bits [ceil(V / 32)] are of some of these tokens and of no others."""
    words = allowed.numpy().view(np.uint32).copy()
    np.bitwise_and.at(words, token_ids // 32, ~(np.uint32(1) << (token_ids % 32).astype(np.uint32)))
    return not words.any()
