"""What a step computes: the scheduler's plan, and the drafts' part in it; and what that takes. Imports no torch."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from evospec.engine.messages import StepTimings
from evospec.engine.request import Request

Part = Literal["schedule", "draft", "forward", "sample", "commit"]


class ScheduledSequence(msgspec.Struct, frozen=True):
    """One sequence's share of a step: ``token_ids`` at positions ``start``, ``start + 1``, ...

    The last ``num_logits`` of these rows have their logits computed: first ``num_prompt_logits`` rows
    for ``sampling.prompt_logprobs``, then ``num_sampled`` rows: once the sequence is computed to its
    end, that of its last known token and one for each draft token. Prompt rows begin at ``start``, the
    row at position p scores prompt token p + 1; a prompt preempted before its first output token is
    computed again from position 0, and its rows are given again.
    """

    request: Request
    start: int
    token_ids: list[int]
    num_draft_tokens: int
    """How many of ``token_ids`` are drafts; they come last."""
    num_prompt_logits: int
    num_logits: int
    block_ids: array[int]
    """All blocks of the sequence, int32 in order of position, including those for this step; valid until its commit."""

    @classmethod
    def of(cls, request: Request, num_tokens: int) -> ScheduledSequence:
        """The next ``num_tokens`` of a request, its drafts after those that it has."""
        known, start = request.all_token_ids, request.num_computed_tokens
        token_ids = known[start : start + num_tokens]
        end, num_drafts = start + len(token_ids), num_tokens - len(token_ids)
        if num_drafts:
            token_ids += request.draft_token_ids[:num_drafts]
        num_prompt_logits = 0
        if request.wants_prompt_logits:
            num_prompt_logits = min(end, len(request.prompt_token_ids) - 1) - start
        num_sampled = 1 + num_drafts if end == len(known) else 0
        num_logits = num_prompt_logits + num_sampled
        return cls(request, start, token_ids, num_drafts, num_prompt_logits, num_logits, request.block_ids)

    @property
    def num_sampled(self) -> int:
        """Rows from which tokens are chosen, after the prompt's: 0 while prefill is unfinished."""
        return self.num_logits - self.num_prompt_logits

    @property
    def decodes(self) -> bool:
        """Whether no token of its prompt is computed."""
        return self.start >= len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens before the drafts."""
        return len(self.token_ids) - self.num_draft_tokens

    @property
    def draft_token_ids(self) -> list[int]:
        return self.token_ids[len(self.token_ids) - self.num_draft_tokens :]


class DraftSlot(msgspec.Struct, frozen=True):
    """A decoding sequence's room for draft tokens in the step being planned."""

    request: Request
    num_tokens: int
    """Most tokens to draft; may be 0."""
    block_ids: array[int]
    """All blocks of the sequence, int32 in order of position; they hold its known tokens and ``num_tokens`` more."""


class DraftLengths(Protocol):
    """Who decides how many tokens are drafted."""

    def draft_lengths(self, requests: Sequence[Request], limits: Sequence[int], num_joining: int) -> list[int]:
        """How many tokens to draft for each decoding sequence, at most its limit; ``num_joining`` more soon decode."""
        ...


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. ``preempted`` lost their blocks in this call and wait again."""

    sequences: list[ScheduledSequence]
    num_tokens: int
    num_prompt_tokens: int
    """How many of them are of prompts, or of sequences that are computed again."""
    preempted: list[Request]


class StepClock:
    """Measures a step from its beginning on, part after part."""

    def __init__(self) -> None:
        self._seconds: dict[Part, float] = dict.fromkeys(("schedule", "draft", "forward", "sample", "commit"), 0.0)
        self._last = time.perf_counter()

    def lap(self, part: Part) -> None:
        """A part of the step ends; a part may come more than once."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """Of all parts so far."""
        return sum(self._seconds.values())

    def seconds_without(self, part: Part) -> float:
        """Of all parts so far but one."""
        return self.seconds - self._seconds[part]

    def timings(self, plan: SchedulerOutput, vocabulary: float) -> StepTimings:
        """The step is over; ``vocabulary``: the seconds of its drafting in which vocabularies learned."""
        return StepTimings(
            **self._seconds, num_tokens=plan.num_tokens, num_sequences=len(plan.sequences), vocabulary=vocabulary
        )
