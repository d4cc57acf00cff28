"""How many tokens to draft for each sequence of a step: as many as make tokens come fastest, down to none.

The rate of a step is (1 + expected accepted drafts, summed over sequences) / (verify time + draft time). The times come
from a table measured at start-up, those of drafts made dearer by what they have taken since; the chance that a draft is
accepted from what verification has shown so far. That is asked three times: before drafting, whether it pays at all;
after each token of the chains, whether another does (``StopRule``); and when they are drafted, how many of them are
worth verifying. The last two know how sure of its tokens the draft is. What verification has shown of a tenant's drafts
decides for its sequences only; those of a step share what it has room for, the likeliest drafts first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from evospec.engine.request import Request
from evospec.engine.sampling.choose import is_greedy
from evospec.engine.speculation.length.acceptance import IDLE_MEMORY, MAX_ACCEPTANCE, Ratio, Tenant, Tenants
from evospec.engine.speculation.length.costs import ServedCosts, StepCosts
from evospec.engine.speculation.length.plan import Plan, all_before, best_plan, best_verified, worth_reading
from evospec.engine.speculation.length.policy import Candidate, EarlyStop, Length, LengthPolicy
from evospec.engine.step import Copy, Proposal
from evospec.kernels.native_chain import StopRule

_MIN_WORTH = 0.1
"""Tokens that copying for a sequence must promise, all costs taken off: a tenth of what its step makes anyhow."""
_MANY_SEQUENCES = 8
"""So many in a step, or more."""
_QUIET_STEPS, _LOOK_INTERVAL = 16, 4
"""Where many sequences get no drafts for so many steps, what might be drafted is looked for so seldom."""
_PROBE_TOKENS = 2


@dataclass(eq=False, slots=True)
class _Sequence:
    """What is kept of a decoding sequence from step to step."""

    tenant: Tenant
    """How its tenant's drafts have fared; it keeps the one that was found first."""
    greedy: bool
    """Whether its tokens are the most likely ones."""
    ratio: Ratio = field(default_factory=Ratio)
    """How its own have, against that."""


@dataclass(eq=False, slots=True)
class _Row:
    """A sequence in a step."""

    of: Candidate
    sequence: _Sequence
    planned: int = 0
    """How many tokens are best to draft, as far as is known before any is."""

    def of_places(self, limit: int) -> list[float]:
        """See ``Acceptance.of_places``."""
        return self.sequence.tenant.acceptance.of_places(self.sequence.ratio, limit, self.of.repeat)


class AdaptiveLength(LengthPolicy):
    """Maximises the expected rate of tokens. It reads no clock: it is told what drafts took.

    Args:
        costs: of a step's parts, as measured at start.
        stops_early: whether chains can end before their limit; otherwise they are as long as is best on average.
    """

    def __init__(self, costs: StepCosts, *, stops_early: bool) -> None:
        self._costs, self._stops_early = ServedCosts(costs), stops_early
        self._tenants = Tenants()
        self._sequences: dict[Request, _Sequence] = {}
        self._step: dict[Request, _Row] = {}
        """The sequences of the step."""
        self._idle_batch: tuple[list[Request], int] | None = None
        """The sequences, and how many join them, for whom no draft was found to pay; nothing was observed since."""
        self._quiet_steps = 0
        """For how many steps nothing was drafted or copied for many sequences, whichever they were."""
        self._plan = Plan([], 0.0)
        """The last one, those that join included."""
        self._expected_seconds = 0.0
        """That drafting takes in this step."""

    def drafts_for_most(self, tenant: str) -> bool:
        return self._tenants.of(tenant).drafted_share >= 0.5

    def rests(self, num_sequences: int) -> bool:
        """Whether nothing has been worth drafting for so long that this step does without a look at it."""
        self._quiet_steps = self._quiet_steps + 1 if num_sequences >= _MANY_SEQUENCES else 0
        return self._quiet_steps > _QUIET_STEPS and self._quiet_steps % _LOOK_INTERVAL != 0

    def lengths(self, candidates: Sequence[Candidate], num_joining: int) -> list[Length]:
        """The best lengths by what is known; while that is none at all, a short probe now and then.

        Best for the batch as it will be with those that join: before its first draft a sequence's whole text has to be
        read, which does not pay where it would be drafted for only until the others' prompts are computed.
        """
        step = [_Row(one, self._sequence(one.request)) for one in candidates]
        self._step = {row.of.request: row for row in step}
        rows_of: dict[Tenant, list[int]] = defaultdict(list)
        for number, row in enumerate(step):
            rows_of[row.sequence.tenant].append(number)
        lengths = self._plan_lengths(step, list(rows_of), num_joining)
        for tenant, rows in rows_of.items():
            tenant.take_step(any(lengths[row] for row in rows))
        if not any(lengths):
            self._costs.idle()
        self._probe(step, lengths, rows_of)
        for tenant, rows in rows_of.items():
            tenant.take_drafted(sum(lengths[row] > 0 for row in rows) / len(rows))
        for row, length in zip(step, lengths, strict=True):
            row.planned = length
            if length == 0:
                row.sequence.ratio.fade(IDLE_MEMORY)
        copied = self._worth_copying(step)
        most = []
        for one, length, of_copy in zip(candidates, lengths, copied, strict=True):
            most.append(Length(of_copy or (one.limit if length and self._stops_early else length), of_copy > 0))
        if any(length.num_tokens for length in most):
            self._quiet_steps = 0
        return most

    def end(self, request: Request) -> None:
        self._sequences.pop(request, None)

    def _sequence(self, request: Request) -> _Sequence:
        known = self._sequences.get(request)
        if known is None:
            tenant = self._tenants.of(request.tenant)
            known = self._sequences[request] = _Sequence(tenant, is_greedy(request.sampling))
        return known

    def _plan_lengths(self, step: Sequence[_Row], tenants: Sequence[Tenant], num_joining: int) -> list[int]:
        batch = list(self._step), num_joining
        if batch == self._idle_batch and all(tenant.rests for tenant in tenants):
            return [0] * len(step)
        chances = [self._chances(row, len(step) + num_joining) for row in step]
        self._plan = best_plan(self._costs, chances + [[]] * num_joining)
        lengths = self._plan.lengths[: len(chances)]
        self._idle_batch = None if any(lengths) else batch
        return lengths

    def stop_rule(self, lengths: Mapping[Request, int]) -> EarlyStop | None:
        if not self._stops_early:
            return None
        count, rate = len(lengths), self._plan.rate
        sizes = [len(self._plan.lengths) + count * place for place in range(max(lengths.values()) + 1)]
        verify_costs = [
            rate * (self._costs.verify(after) - self._costs.verify(before)) / count for before, after in pairwise(sizes)
        ]
        numbers: dict[Tenant, int] = {}
        tenants: dict[Request, int] = {}
        acceptance: dict[Request, Sequence[float]] = {}
        for request, length in lengths.items():
            row = self._step[request]
            tenants[request] = numbers.setdefault(row.sequence.tenant, len(numbers))
            acceptance[request] = row.of_places(length)
        chances = np.array([tenant.acceptance.of_levels() for tenant in numbers], np.float32)
        rule = StopRule(chances, verify_costs, draft_cost=rate * self._costs.next_draft(count))
        return EarlyStop(rule, tenants, acceptance)

    def worth_verifying(self, proposals: Mapping[Request, Proposal]) -> list[int]:
        drafted, unread, chances = list[int](), 0, list[list[float]]()
        for request, proposal in proposals.items():
            row = self._step[request]
            if not proposal.is_copied:
                drafted.append(len(proposal.token_ids))
                unread += row.of.num_unread
            if proposal.confidence:
                sequence = row.sequence
                of_drafts = sequence.tenant.acceptance.of_drafts
                sure = of_drafts(proposal.confidence, greedy=sequence.greedy, copied=proposal.is_copied)
                chances.append(all_before(sure))
        self._expected_seconds = self._draft_seconds(drafted) + unread * self._costs.read
        chances += [[]] * (len(self._plan.lengths) - len(chances))
        lengths = iter(best_verified(self._costs.verify, chances, self._expected_seconds))
        return [next(lengths) if one.confidence else len(one.token_ids) for one in proposals.values()]

    def record_drafts(self, request: Request, proposal: Proposal, outcomes: Sequence[bool]) -> None:
        if not proposal.is_copied:
            self._idle_batch = None
            one, repeat = self._sequence(request), () if proposal.copy is None else proposal.copy.levels
            one.tenant.acceptance.record_drafts(one.ratio, outcomes, proposal.confidence, one.greedy, repeat)

    def record_copy(self, request: Request, copy: Copy, outcomes: Sequence[bool]) -> None:
        one = self._sequence(request)
        one.tenant.acceptance.record_copy(outcomes, copy.levels, one.greedy)

    def record_seconds(self, seconds: float) -> None:
        self._costs.correct(self._expected_seconds, seconds)

    def record_step(self, num_tokens: int, seconds: float) -> None:
        # Of a large batch's step what it takes more grows with its tokens, and is not to be told from what they cost.
        if len(self._step) < _MANY_SEQUENCES:
            self._costs.correct_rest(num_tokens, seconds)

    def _chances(self, row: _Row, num_sequences: int) -> list[float]:
        """For ``best_plan``; none where they are not worth reading the sequence's text."""
        chances = all_before(row.of_places(row.of.limit))
        return chances if worth_reading(self._costs, num_sequences, chances, row.of.num_unread) else []

    def _worth_copying(self, step: Sequence[_Row]) -> list[int]:
        """How much to copy for each sequence for which that promises more than its drafts do; 0 for the others.

        One sequence at a time, what is planned for the others being as it is.
        """
        worth = [0] * len(step)
        num_tokens = len(self._plan.lengths) + sum(row.planned for row in step)
        num_drafting = sum(row.planned > 0 for row in step)
        for number, row in enumerate(step):
            if row.of.copy is None:
                continue
            others, sequence = num_tokens - row.planned, row.sequence
            sure = sequence.tenant.acceptance.of_drafts(row.of.repeat, greedy=sequence.greedy, copied=True)
            gains = list(accumulate(all_before(sure), initial=0.0))
            rate, least = self._plan.rate, self._costs.verify(others)
            worths = [gain - rate * (self._costs.verify(others + count) - least) for count, gain in enumerate(gains)]
            length = max(range(len(worths)), key=worths.__getitem__)
            if worths[length] > max(self._worth_of_drafts(row, others, num_drafting), _MIN_WORTH):
                worth[number] = length
        return worth

    def _worth_of_drafts(self, row: _Row, others: int, num_drafting: int) -> float:
        planned = row.planned
        if planned == 0:
            return 0.0
        expected = sum(all_before(row.of_places(planned)))
        seconds = self._draft_seconds([planned] * num_drafting) - self._draft_seconds([planned] * (num_drafting - 1))
        seconds += self._costs.verify(others + planned) - self._costs.verify(others)
        return expected - self._plan.rate * seconds

    def _draft_seconds(self, lengths: Sequence[int]) -> float:
        """Of chains that go on or end together."""
        if not lengths:
            return 0.0
        return self._costs.first_draft(len(lengths)) + (max(lengths) - 1) * self._costs.next_draft(len(lengths))

    def _probe(self, step: Sequence[_Row], lengths: list[int], rows_of: Mapping[Tenant, Sequence[int]]) -> None:
        """Draft for a sequence of each tenant whose turn it is, where drafts could pay if all were accepted."""
        probed = [rows for tenant, rows in rows_of.items() if tenant.is_probed]
        if not probed:
            return
        limits = [row.of.limit for row in step]
        best_case = [[MAX_ACCEPTANCE ** (place + 1) for place in range(limit)] for limit in limits]
        if any(best_plan(self._costs, best_case).lengths):
            for rows in probed:
                chosen = max(rows, key=limits.__getitem__)
                lengths[chosen] = min(limits[chosen], _PROBE_TOKENS)
