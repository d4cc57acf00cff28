"""One replica of the model: the server's own scheduler, prefix cache and draft lengths, steps that only cost time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

from evospec.engine.config import MAX_SPECULATIVE_TOKENS, CacheConfig, SchedulerConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request
from evospec.engine.scheduler import Scheduler
from evospec.engine.speculation.length.adaptive import AdaptiveLength
from evospec.engine.speculation.length.costs import Curve, StepCosts
from evospec.engine.speculation.length.policy import Chain
from evospec.engine.step_plan import DraftSlot, ScheduledSequence, SchedulerOutput

FIRST_TOKENS = 128
"""Tokens of prompts that a step reads at a higher price, for all that does not grow with them."""
_UNREAD_FOR_FREE = 8
"""New tokens that a draft reads with what its next token costs."""


@dataclass(frozen=True)
class Costs:
    """What the model knows of a server; seconds are of a core.

    The first four are milliseconds by size, and ``read`` of a token, as a server measures and logs them at its start.
    The others are fitted to one replica.
    """

    verify: dict[str, float]
    first_draft: dict[str, float]
    next_draft: dict[str, float]
    read: float
    step: float = 0.0
    """Seconds of a step beside that; ``sequence`` of each of its sequences, ``prompt_step`` where it reads prompts,
    ``prompt_token`` of a prompt's token, ``prompt_first`` of a step's first ``FIRST_TOKENS`` of them in addition,
    ``prompt_pair`` of a prompt's token and one before it, which it attends to."""
    sequence: float = 0.0
    prompt_step: float = 0.0
    prompt_token: float = 2e-4
    prompt_first: float = 0.0
    prompt_pair: float = 0.0
    engine: float = 1.0
    """How many times as long steps take while serving, but for what they read of prompts."""
    request: float = 4e-3
    """Outside of the engine before a request is there; ``event`` of each part of its answer, ``closing`` after it."""
    event: float = 3e-4
    closing: float = 2e-3
    idle: float = 0.0
    """Share of a core that a replica uses without requests."""
    accepted: tuple[float, ...] = (0.6,)
    """Share of an answer that was drafted, of as many answers; ``power`` of it is the chance that a draft token is
    accepted, if those before it are."""
    power: float = 1.0
    reads_prompts_apart: bool = False
    """As ``engine.kv_cache_manager`` has it: then only prompts are found in the prefix cache."""
    snapshot: tuple[float, float, float] = (3000.0, 20.0, 10.0)
    """Bytes of a session in Redis, at first, for each token that it was asked, and for each that it answered."""
    redis: tuple[float, float] = (1000.0, 300.0)
    """Bytes to and from Redis beside that, a request."""

    def step_seconds(self, num_decoded: int, num_sequences: int) -> float:
        """Seconds of a step but for what it reads of prompts, and drafts.

        Prompts that are read apart have a pass of their own over the weights; others share that of decoded tokens.
        """
        num_verified = num_decoded if self.reads_prompts_apart else max(num_decoded, 1)
        seconds = self.step + self.sequence * num_sequences
        return self.engine * (seconds + (self.curves.verify(num_verified) if num_verified else 0.0))

    @cached_property
    def curves(self) -> StepCosts:
        """What the server's policy of draft lengths is given."""
        verify, first_draft, next_draft = (
            Curve([(int(size), one / 1e3) for size, one in table.items()])
            for table in (self.verify, self.first_draft, self.next_draft)
        )
        return StepCosts(verify, first_draft, next_draft, self.read / 1e3)


@dataclass(frozen=True)
class Step:
    """A step that takes ``seconds`` of a core, and how many tokens each of its sequences gets."""

    plan: SchedulerOutput
    kept: list[int]
    seconds: float


class Replica:
    """Takes steps while it has requests; whoever drives it lets their time pass between ``begin`` and ``end``.

    ``accepted``: ``Costs.accepted`` of requests by name; one that is not there has that of any answer.
    """

    def __init__(self, costs: Costs, num_blocks: int, seed: int, accepted: Mapping[str, float]) -> None:
        self._costs, self._curves, self._accepted = costs, costs.curves, accepted
        cache, apart = CacheConfig(), costs.reads_prompts_apart
        self._scheduler = Scheduler(SchedulerConfig(), cache, num_blocks, num_blocks * cache.block_size, None, apart)
        self._policy = AdaptiveLength(self._curves, stops_early=False)
        self._chance = random.Random(seed)

    def add(self, name: str, tenant: str, prompt: list[int], max_tokens: int) -> Request:
        request = Request(name, b"", tenant, SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0), prompt)
        self._scheduler.add(request)
        return request

    def begin(self) -> Step | None:
        """Plan a step; None where there is nothing to do."""
        if not self._scheduler.has_work():
            return None
        decodes, slots = self._scheduler.reserve(self)
        costs, drafting = self._costs, self._costs.engine * self._draft(slots)
        plan = self._scheduler.schedule(decodes)
        kept = [self._verify(sequence) for sequence in plan.sequences]
        seconds = costs.step_seconds(plan.num_tokens - plan.num_prompt_tokens, len(plan.sequences))
        if plan.num_prompt_tokens:
            seconds += costs.prompt_step + costs.prompt_token * plan.num_prompt_tokens
            seconds += costs.prompt_first * min(plan.num_prompt_tokens, FIRST_TOKENS)
            prompts = (one for one in plan.sequences if not one.decodes)
            seconds += costs.prompt_pair * sum(num_pairs(one.start, len(one.token_ids)) for one in prompts)
        else:
            self._policy.record_step(plan.num_tokens, seconds)
        if drafting:
            self._policy.record_seconds(drafting)
        self._scheduler.record_seconds(plan, seconds + drafting)
        return Step(plan, kept, seconds + drafting)

    def end(self, step: Step, answers: Mapping[Request, list[int]]) -> list[tuple[Request, bool]]:
        """Commit a step, given what requests will have said at their ends; who got tokens, and whether it is over."""
        events = []
        for sequence, count in zip(step.plan.sequences, step.kept, strict=True):
            request = sequence.request
            said = len(request.output_token_ids)
            tokens = answers[request][said : said + count]
            is_over = said + len(tokens) == len(answers[request])
            self._scheduler.commit(sequence, tokens, is_over)
            if tokens:
                events.append((request, is_over))
        return events

    def draft_lengths(self, requests: Sequence[Request], limits: Sequence[int], num_joining: int) -> list[int]:
        """The server's own choice, where nothing can be copied (``DraftLengths``)."""
        sequences = [request.draft_state.draftable for request in requests]
        if self._policy.rests(sequences):
            return [0] * len(requests)
        for request, one, limit in zip(requests, sequences, limits, strict=True):
            one.tenant, one.limit = request.tenant, min(limit, MAX_SPECULATIVE_TOKENS)
            one.num_unread = self._num_unread(request)
        return self._policy.lengths(sequences, num_joining)

    def _num_unread(self, request: Request) -> int:
        """A cached prefix was read by whoever computed it."""
        read = max(request.draft_state.num_entries, request.num_cached_tokens)
        return max(request.num_tokens - read - _UNREAD_FOR_FREE, 0)

    def _draft(self, slots: Sequence[DraftSlot]) -> float:
        """Write drafts, whatever they are; the seconds that takes."""
        drafting = [slot for slot in slots if slot.num_tokens]
        seconds, curves = 0.0, self._curves
        for slot in drafting:
            seconds += self._num_unread(slot.request) * curves.read
            slot.request.draft_state.num_entries = slot.request.num_tokens
            slot.request.draft_token_ids = [0] * slot.num_tokens
        for place in range(max((slot.num_tokens for slot in drafting), default=0)):
            still = sum(slot.num_tokens > place for slot in drafting)
            seconds += curves.next_draft(still) if place else curves.first_draft(still)
        if drafting:
            chains = [Chain(slot.request.draft_token_ids, []) for slot in drafting]
            self._policy.worth_verifying([slot.request.draft_state.draftable for slot in drafting], chains)
        return seconds

    def _verify(self, sequence: ScheduledSequence) -> int:
        """How many tokens a sequence gets; the policy is told what became of its drafts."""
        if not sequence.num_sampled:
            return 0
        accepted, name, of_any = 0, sequence.request.request_id, self._costs.accepted
        share = self._accepted.get(name, of_any[crc32(name.encode()) % len(of_any)])
        chance = share**self._costs.power
        while accepted < sequence.num_draft_tokens and self._chance.random() < chance:
            accepted += 1
        if sequence.num_draft_tokens:
            outcomes = [True] * accepted + [False] * (accepted < sequence.num_draft_tokens)
            chain = Chain(sequence.draft_token_ids, [])
            self._policy.record_drafts(sequence.request.draft_state.draftable, chain, outcomes)
            sequence.request.draft_state.num_entries += accepted
        return 1 + accepted


def num_pairs(start: int, count: int) -> float:
    """Of ``count`` tokens of a sequence, each with those before it, where ``start`` are before the first."""
    return count * (start + count / 2)
