"""Where a sequence ends. The one routine that decides which sampled tokens are kept, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from evospec.engine.messages import FinishReason, SamplingParams
from evospec.engine.text.detokenizer import IncrementalDetokenizer, StopStringFinder


class Truncation(msgspec.Struct, frozen=True):
    """How many of the tokens given are kept; the other fields as in ``engine.messages.EngineOutput``."""

    num_kept: int
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_length: int | None = None


class StopChecker:
    """Follows one sequence's output and finds the token that ends it.

    In order of precedence at a token: EOS, ``stop_token_ids``, stop strings, length. The first three
    count only after ``min_tokens`` tokens. The result does not depend on how the tokens are split into steps.
    """

    def __init__(
        self,
        params: SamplingParams,
        num_prompt_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self._params = params
        self._eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._ends = self._eos_token_ids | self._stop_token_ids
        self._max_output = max(1, min(params.max_tokens, max_model_len - num_prompt_tokens))
        self._detokenizer = IncrementalDetokenizer(token_bytes) if params.stop else None
        self._finder = StopStringFinder(params.stop)
        self._num_output = 0

    def push(self, token_ids: Sequence[int]) -> Truncation:
        """Take newly sampled tokens, in order; those after the ending one are to be dropped."""
        if self._detokenizer is None and self._ends.isdisjoint(token_ids):  # only length can end it
            num_kept = min(len(token_ids), self._max_output - self._num_output)
            self._num_output += num_kept
            return Truncation(num_kept, "length" if self._num_output >= self._max_output else None)
        for index, token_id in enumerate(token_ids):
            if (end := self._end_at(token_id, index + 1)) is not None:
                return end
        return Truncation(len(token_ids))

    def _end_at(self, token_id: int, num_kept: int) -> Truncation | None:
        """The end that this token brings about, with so many tokens kept."""
        may_stop = self._num_output >= self._params.min_tokens
        self._num_output += 1
        if may_stop and token_id in self._eos_token_ids:
            return Truncation(num_kept, "stop")
        if may_stop and token_id in self._stop_token_ids:
            return Truncation(num_kept, "stop", token_id)
        if self._detokenizer is not None:
            match = self._finder.push(self._detokenizer.push([token_id]))
            if may_stop and match is not None:
                return Truncation(num_kept, "stop", *match)
        if self._num_output >= self._max_output:
            return Truncation(num_kept, "length")
        return None
