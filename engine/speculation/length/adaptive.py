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

from engine.speculation.length.acceptance import MAX_ACCEPTANCE, Ratio, Tenant, Tenants
from engine.speculation.length.costs import ServedCosts, StepCosts
from engine.speculation.length.plan import Plan, all_before, best_plan, best_verified, worth_reading
from engine.speculation.length.policy import Chain, Draftable, DraftLengths, Repeat, StopRule

_MIN_WORTH = 0.1
"""Tokens that copying for a sequence must promise, all costs taken off: a tenth of what its step makes anyhow."""
_CROWD, _QUIET_STEPS, _LOOK_INTERVAL = 8, 16, 4
"""Where so many sequences get no drafts for so many steps, what might be drafted is looked for so seldom."""
_PROBE_TOKENS = 2


@dataclass(slots=True, eq=False)
class _Sequence:
    """A running sequence."""

    tenant: Tenant
    draftable: Draftable
    """As it is in the last step that was asked for."""
    planned: int = 0
    """How many tokens are best to draft in that step, on average."""
    ratio: Ratio = field(default_factory=Ratio)

    def of_places(self, limit: int) -> list[float]:
        """See ``Acceptance.of_places``."""
        return self.tenant.acceptance.of_places(self.ratio, limit, _level(self.draftable.repeat))


class AdaptiveLength:
    """A ``LengthPolicy`` that maximises the expected rate of tokens. It reads no clock: it is told what drafts took.

    Args:
        costs: of a step's parts, as measured at start.
        stops_early: whether chains can end before their limit; otherwise they are as long as is best on average.
    """

    def __init__(self, costs: StepCosts, *, stops_early: bool) -> None:
        self._costs, self._stops_early = ServedCosts(costs), stops_early
        self._tenants = Tenants()
        self._sequences: dict[str, _Sequence] = {}
        """By request."""
        self._step: list[_Sequence] = []
        """Those of the step."""
        self._idle_batch: tuple[list[str], int] | None = None
        """The sequences, and how many join them, for whom no draft was found to pay; nothing was observed since."""
        self._quiet_batch: tuple[list[str], int] = [], 0
        """The same of the last step, and for how many it has had neither drafts nor copies:"""
        self._quiet_steps = 0
        self._plan = Plan([], 0.0)
        """The last one, those that join included."""
        self._expected_seconds = 0.0
        """That drafting takes in this step."""

    def drafts_for_most(self, tenant: str) -> bool:
        """Whether of late most of a tenant's sequences were drafted for."""
        return self._tenants.of(tenant).drafted_share >= 0.5

    def rests(self, request_ids: Sequence[str], num_joining: int) -> bool:
        """Whether nothing has been worth drafting for so long that this step does without a look at it."""
        batch = list(request_ids), num_joining
        if batch != self._quiet_batch:
            self._quiet_batch, self._quiet_steps = batch, 0
        self._quiet_steps += 1
        is_quiet = len(request_ids) >= _CROWD and self._quiet_steps > _QUIET_STEPS
        return is_quiet and self._quiet_steps % _LOOK_INTERVAL != 0

    def lengths(self, sequences: Sequence[Draftable], num_joining: int) -> DraftLengths:
        """The best lengths by what is known; while that is none at all, a short probe now and then.

        Best for the batch as it will be with those that join: before its first draft a sequence's whole text has to be
        read, which does not pay where it would be drafted for only until the others' prompts are computed.
        """
        self._step = [self._sequence(one) for one in sequences]
        rows_of: dict[Tenant, list[int]] = defaultdict(list)
        for row, one in enumerate(self._step):
            rows_of[one.tenant].append(row)
        lengths = self._plan_lengths(list(rows_of), num_joining)
        for tenant, rows in rows_of.items():
            tenant.take_step(any(lengths[row] for row in rows))
        if not any(lengths):
            self._costs.idle()
        self._probe(lengths, rows_of)
        for tenant, rows in rows_of.items():
            tenant.take_drafted(sum(lengths[row] > 0 for row in rows) / len(rows))
        for one, length in zip(self._step, lengths, strict=True):
            one.planned = length
            if length == 0:
                one.ratio.idle()
        copied = self._worth_copying()
        most = [
            copied.get(one.request_id, one.limit if length and self._stops_early else length)
            for one, length in zip(sequences, lengths, strict=True)
        ]
        if any(most):
            self._quiet_steps = 0
        return DraftLengths(most, frozenset(copied))

    def _sequence(self, draftable: Draftable) -> _Sequence:
        """The sequence as it is in this step."""
        sequence = self._sequences.get(draftable.request_id)
        if sequence is None:
            sequence = _Sequence(self._tenants.of(draftable.tenant), draftable)
            self._sequences[draftable.request_id] = sequence
        sequence.draftable = draftable
        return sequence

    def _plan_lengths(self, tenants: Sequence[Tenant], num_joining: int) -> list[int]:
        batch = [one.draftable.request_id for one in self._step], num_joining
        if batch == self._idle_batch and all(tenant.rests for tenant in tenants):
            return [0] * len(self._step)
        chances = [self._chances(one, len(self._step) + num_joining) for one in self._step]
        self._plan = best_plan(self._costs, chances + [[]] * num_joining)
        lengths = self._plan.lengths[: len(chances)]
        self._idle_batch = None if any(lengths) else batch
        return lengths

    def stop_rule(self, lengths: Mapping[str, int]) -> StopRule | None:
        """When the chains of the sequences that are drafted for now, with the lengths they have room for, end early."""
        if not self._stops_early:
            return None
        count, rate = len(lengths), self._plan.rate
        sizes = [len(self._plan.lengths) + count * place for place in range(max(lengths.values()) + 1)]
        verify_costs = [
            rate * (self._costs.verify(after) - self._costs.verify(before)) / count for before, after in pairwise(sizes)
        ]
        tenants = {name: self._sequences[name].tenant for name in lengths}
        rows = {tenant: row for row, tenant in enumerate(dict.fromkeys(tenants.values()))}
        return StopRule(
            chances=np.array([tenant.acceptance.of_levels() for tenant in rows], np.float32),
            tenants={name: rows[tenant] for name, tenant in tenants.items()},
            acceptance={name: self._sequences[name].of_places(length) for name, length in lengths.items()},
            verify_costs=verify_costs,
            draft_cost=rate * self._costs.next_draft(count),
            planned={name: self._sequences[name].planned for name in lengths},
        )

    def worth_verifying(self, chains: Mapping[str, Chain]) -> dict[str, int]:
        """How many of each chain's tokens to verify; those without confidence are left as they are."""
        drafted = {name: len(chain.token_ids) for name, chain in chains.items() if not chain.copied}
        unread = sum(self._sequences[name].draftable.num_unread for name in drafted)
        self._expected_seconds = self._draft_seconds(list(drafted.values())) + unread * self._costs.read
        left = {request_id: len(chain.token_ids) for request_id, chain in chains.items() if not chain.confidence}
        chains = {request_id: chain for request_id, chain in chains.items() if chain.confidence}
        chances = []
        for request_id, chain in chains.items():
            acceptance = self._sequences[request_id].tenant.acceptance
            chances.append(all_before(acceptance.of_drafts(chain.confidence, greedy=chain.greedy, copied=chain.copied)))
        chances += [[]] * (len(self._plan.lengths) - len(chances))
        lengths = best_verified(self._costs.verify, chances, self._expected_seconds)
        return left | dict(zip(chains, lengths, strict=False))

    def record_drafts(self, request_id: str, chain: Chain, outcomes: Sequence[bool], repeat: Repeat | None) -> None:
        """What became of a chain, place by place up to the first that the target did not choose."""
        if not chain.copied:
            self._idle_batch = None
            one = self._sequences[request_id]
            one.tenant.acceptance.record_drafts(one.ratio, outcomes, chain.confidence, chain.greedy, _level(repeat))

    def record_copy(self, request_id: str, repeat: Repeat, outcomes: Sequence[bool]) -> None:
        """What became, or would have become, of a copy."""
        self._sequences[request_id].tenant.acceptance.record_copy(outcomes, repeat.levels, repeat.greedy)

    def record_seconds(self, seconds: float) -> None:
        """What the step's drafts took, and what vocabularies learned of them."""
        self._costs.correct(self._expected_seconds, seconds)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._sequences.pop(request_id, None)
        self._idle_batch = None  # a batch with another request of that name is another batch

    def _chances(self, sequence: _Sequence, num_sequences: int) -> list[float]:
        """For ``best_plan``; none where they are not worth reading the sequence's text."""
        chances = all_before(sequence.of_places(sequence.draftable.limit))
        return chances if worth_reading(self._costs, num_sequences, chances, sequence.draftable.num_unread) else []

    def _worth_copying(self) -> dict[str, int]:
        """How much to copy for each sequence for which that promises more than its drafts do.

        One sequence at a time, what is planned for the others being as it is.
        """
        worth = {}
        num_tokens = len(self._plan.lengths) + sum(one.planned for one in self._step)
        num_drafting = sum(one.planned > 0 for one in self._step)
        for one in self._step:
            if (repeat := one.draftable.repeat) is None:
                continue
            others = num_tokens - one.planned
            acceptance = one.tenant.acceptance
            chances = all_before(acceptance.of_drafts(repeat.levels, greedy=repeat.greedy, copied=True))
            gains = list(accumulate(chances, initial=0.0))
            worths = [gain - self._in_tokens(others, number) for number, gain in enumerate(gains)]
            length = max(range(len(worths)), key=worths.__getitem__)
            if worths[length] > max(self._worth_of_drafts(one, others, num_drafting), _MIN_WORTH):
                worth[one.draftable.request_id] = length
        return worth

    def _worth_of_drafts(self, sequence: _Sequence, others: int, num_drafting: int) -> float:
        planned = sequence.planned
        if planned == 0:
            return 0.0
        expected = sum(all_before(sequence.of_places(planned)))
        seconds = self._draft_seconds([planned] * num_drafting) - self._draft_seconds([planned] * (num_drafting - 1))
        return expected - self._in_tokens(others, planned) - self._plan.rate * seconds

    def _in_tokens(self, others: int, number: int) -> float:
        """What verifying so many more tokens costs."""
        return self._plan.rate * (self._costs.verify(others + number) - self._costs.verify(others))

    def _draft_seconds(self, lengths: Sequence[int]) -> float:
        """Of chains that go on or end together."""
        if not lengths:
            return 0.0
        return self._costs.first_draft(len(lengths)) + (max(lengths) - 1) * self._costs.next_draft(len(lengths))

    def _probe(self, lengths: list[int], rows_of: Mapping[Tenant, Sequence[int]]) -> None:
        """Draft for a sequence of each tenant whose turn it is, where drafts could pay if all were accepted."""
        probed = [rows for tenant, rows in rows_of.items() if tenant.is_probed]
        if not probed:
            return
        limits = [one.draftable.limit for one in self._step]
        best_case = [[MAX_ACCEPTANCE ** (place + 1) for place in range(limit)] for limit in limits]
        if any(best_plan(self._costs, best_case).lengths):
            for rows in probed:
                chosen = max(rows, key=limits.__getitem__)
                lengths[chosen] = min(limits[chosen], _PROBE_TOKENS)


def _level(repeat: Repeat | None) -> int | None:
    return None if repeat is None else repeat.levels[0]
