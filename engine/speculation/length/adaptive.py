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
from itertools import accumulate, pairwise

import numpy as np

from evospec.engine.speculation.length.acceptance import IDLE_MEMORY, MAX_ACCEPTANCE, Tenant, Tenants
from evospec.engine.speculation.length.costs import ServedCosts, StepCosts
from evospec.engine.speculation.length.plan import Plan, all_before, best_plan, best_verified, worth_reading
from evospec.engine.speculation.length.policy import Chain, Draftable, LengthPolicy
from evospec.kernels.native_chain import StopRule

_MIN_WORTH = 0.1
"""Tokens that copying for a sequence must promise, all costs taken off: a tenth of what its step makes anyhow."""
_CROWD = 8
"""So many sequences of a step, or more."""
_QUIET_STEPS, _LOOK_INTERVAL = 16, 4
"""Where a crowd gets no drafts for so many steps, what might be drafted is looked for so seldom."""
_PROBE_TOKENS = 2


class AdaptiveLength(LengthPolicy):
    """Maximises the expected rate of tokens. It reads no clock: it is told what drafts took.

    Args:
        costs: of a step's parts, as measured at start.
        stops_early: whether chains can end before their limit; otherwise they are as long as is best on average.
    """

    def __init__(self, costs: StepCosts, *, stops_early: bool) -> None:
        self._costs, self._stops_early = ServedCosts(costs), stops_early
        self._tenants = Tenants()
        self._step: list[Draftable] = []
        """The sequences of the step."""
        self._idle_batch: tuple[list[Draftable], int] | None = None
        """The sequences, and how many join them, for whom no draft was found to pay; nothing was observed since."""
        self._quiet_steps = 0
        """For how many steps nothing was drafted or copied for a crowd, whoever was in it."""
        self._plan = Plan([], 0.0)
        """The last one, those that join included."""
        self._expected_seconds = 0.0
        """That drafting takes in this step."""

    def drafts_for_most(self, tenant: str) -> bool:
        return self._tenants.of(tenant).drafted_share >= 0.5

    def rests(self, sequences: Sequence[Draftable]) -> bool:
        """Whether nothing has been worth drafting for so long that this step does without a look at it."""
        self._quiet_steps = self._quiet_steps + 1 if len(sequences) >= _CROWD else 0
        return self._quiet_steps > _QUIET_STEPS and self._quiet_steps % _LOOK_INTERVAL != 0

    def lengths(self, sequences: Sequence[Draftable], num_joining: int) -> list[int]:
        """The best lengths by what is known; while that is none at all, a short probe now and then.

        Best for the batch as it will be with those that join: before its first draft a sequence's whole text has to be
        read, which does not pay where it would be drafted for only until the others' prompts are computed.
        """
        self._step = list(sequences)
        rows_of: dict[Tenant, list[int]] = defaultdict(list)
        for row, one in enumerate(self._step):
            rows_of[self._tenant(one)].append(row)
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
                one.ratio.fade(IDLE_MEMORY)
        copied = self._worth_copying()
        most = []
        for one, length, of_copy in zip(sequences, lengths, copied, strict=True):
            one.is_copied = of_copy > 0
            most.append(of_copy or (one.limit if length and self._stops_early else length))
        if any(most):
            self._quiet_steps = 0
        return most

    def _tenant(self, sequence: Draftable) -> Tenant:
        """Of a sequence; it keeps the one that it has found first."""
        if sequence.of_tenant is None:
            sequence.of_tenant = self._tenants.of(sequence.tenant)
        return sequence.of_tenant

    def _of_places(self, sequence: Draftable, limit: int) -> list[float]:
        """See ``Acceptance.of_places``."""
        return self._tenant(sequence).acceptance.of_places(sequence.ratio, limit, sequence.repeat)

    def _plan_lengths(self, tenants: Sequence[Tenant], num_joining: int) -> list[int]:
        batch = self._step, num_joining
        if batch == self._idle_batch and all(tenant.rests for tenant in tenants):
            return [0] * len(self._step)
        chances = [self._chances(one, len(self._step) + num_joining) for one in self._step]
        self._plan = best_plan(self._costs, chances + [[]] * num_joining)
        lengths = self._plan.lengths[: len(chances)]
        self._idle_batch = None if any(lengths) else batch
        return lengths

    def stop_rule(self, sequences: Sequence[Draftable], lengths: Sequence[int]) -> StopRule | None:
        if not self._stops_early:
            return None
        count, rate = len(lengths), self._plan.rate
        sizes = [len(self._plan.lengths) + count * place for place in range(max(lengths) + 1)]
        verify_costs = [
            rate * (self._costs.verify(after) - self._costs.verify(before)) / count for before, after in pairwise(sizes)
        ]
        numbers: dict[Tenant, int] = {}
        for one, length in zip(sequences, lengths, strict=True):
            one.tenant_number = numbers.setdefault(self._tenant(one), len(numbers))
            one.acceptance = self._of_places(one, length)
        chances = np.array([tenant.acceptance.of_levels() for tenant in numbers], np.float32)
        return StopRule(chances, verify_costs, draft_cost=rate * self._costs.next_draft(count))

    def worth_verifying(self, sequences: Sequence[Draftable], chains: Sequence[Chain]) -> list[int]:
        rows = list(zip(sequences, chains, strict=True))
        drafted = [len(chain.token_ids) for one, chain in rows if not one.is_copied]
        unread = sum(one.num_unread for one in sequences if not one.is_copied)
        self._expected_seconds = self._draft_seconds(drafted) + unread * self._costs.read
        chances = []
        for one, chain in rows:
            if chain.confidence:
                of_drafts = self._tenant(one).acceptance.of_drafts
                chances.append(all_before(of_drafts(chain.confidence, greedy=one.greedy, copied=one.is_copied)))
        chances += [[]] * (len(self._plan.lengths) - len(chances))
        lengths = iter(best_verified(self._costs.verify, chances, self._expected_seconds))
        return [next(lengths) if chain.confidence else len(chain.token_ids) for chain in chains]

    def record_drafts(self, sequence: Draftable, chain: Chain, outcomes: Sequence[bool]) -> None:
        if not sequence.is_copied:
            self._idle_batch = None
            acceptance = self._tenant(sequence).acceptance
            acceptance.record_drafts(sequence.ratio, outcomes, chain.confidence, sequence.greedy, sequence.repeat)

    def record_copy(self, sequence: Draftable, outcomes: Sequence[bool]) -> None:
        self._tenant(sequence).acceptance.record_copy(outcomes, sequence.repeat, sequence.greedy)

    def record_seconds(self, seconds: float) -> None:
        self._costs.correct(self._expected_seconds, seconds)

    def record_step(self, num_tokens: int, seconds: float) -> None:
        # Of a crowd's step what it takes more grows with its tokens, and is not to be told from what they cost.
        if len(self._step) < _CROWD:
            self._costs.correct_rest(num_tokens, seconds)

    def _chances(self, sequence: Draftable, num_sequences: int) -> list[float]:
        """For ``best_plan``; none where they are not worth reading the sequence's text."""
        chances = all_before(self._of_places(sequence, sequence.limit))
        return chances if worth_reading(self._costs, num_sequences, chances, sequence.num_unread) else []

    def _worth_copying(self) -> list[int]:
        """How much to copy for each sequence for which that promises more than its drafts do; 0 for the others.

        One sequence at a time, what is planned for the others being as it is.
        """
        worth = [0] * len(self._step)
        num_tokens = len(self._plan.lengths) + sum(one.planned for one in self._step)
        num_drafting = sum(one.planned > 0 for one in self._step)
        for row, one in enumerate(self._step):
            if not one.repeat:
                continue
            others = num_tokens - one.planned
            acceptance = self._tenant(one).acceptance
            chances = all_before(acceptance.of_drafts(one.repeat, greedy=one.greedy, copied=True))
            gains = list(accumulate(chances, initial=0.0))
            rate, least = self._plan.rate, self._costs.verify(others)
            worths = [gain - rate * (self._costs.verify(others + number) - least) for number, gain in enumerate(gains)]
            length = max(range(len(worths)), key=worths.__getitem__)
            if worths[length] > max(self._worth_of_drafts(one, others, num_drafting), _MIN_WORTH):
                worth[row] = length
        return worth

    def _worth_of_drafts(self, sequence: Draftable, others: int, num_drafting: int) -> float:
        planned = sequence.planned
        if planned == 0:
            return 0.0
        expected = sum(all_before(self._of_places(sequence, planned)))
        seconds = self._draft_seconds([planned] * num_drafting) - self._draft_seconds([planned] * (num_drafting - 1))
        seconds += self._costs.verify(others + planned) - self._costs.verify(others)
        return expected - self._plan.rate * seconds

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
        limits = [one.limit for one in self._step]
        best_case = [[MAX_ACCEPTANCE ** (place + 1) for place in range(limit)] for limit in limits]
        if any(best_plan(self._costs, best_case).lengths):
            for rows in probed:
                chosen = max(rows, key=limits.__getitem__)
                lengths[chosen] = min(limits[chosen], _PROBE_TOKENS)
