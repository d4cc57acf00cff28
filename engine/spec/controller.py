"""How many tokens to draft for each sequence of a step: as many as make tokens come fastest, down to none.

The rate of a step is (1 + expected accepted drafts, summed over sequences) / (verify time + draft time). The times come
from a table measured at start-up, those of drafts made dearer by what they have taken since; the chance that a draft is
accepted from what verification has shown so far. That is asked three times: before drafting, whether it pays at all;
after each token of the chains, whether another does (``StopRule``); and when they are drafted, how many of them are
worth verifying. The last two know how sure of its tokens the draft is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from engine.spec.acceptance import MAX_ACCEPTANCE, Acceptance
from engine.spec.best_lengths import Plan, all_before, best_plan, best_verified, worth_reading
from engine.spec.length_policy import Chain, Draftable, DraftLengths, Repeat
from engine.spec.step_costs import ServedCosts, StepCosts
from engine.spec.stop_rule import StopRule

_MIN_WORTH = 0.1
"""Tokens that copying for a sequence must promise, all costs taken off: a tenth of what its step makes anyhow."""
_IDLE_INTERVAL = 16
"""Where nothing has been drafted for some steps, lengths are worked out so seldom, until the batch changes."""
_CROWD, _QUIET_STEPS, _LOOK_INTERVAL = 8, 16, 4
"""Where so many sequences get no drafts for so many steps, what might be drafted is looked for so seldom."""
_SHARE_RATE = 0.1
"""Weight of a step in the share of sequences that are drafted for."""
_PROBE_INTERVAL, _PROBE_STEPS, _PROBE_TOKENS = 256, 8, 2
"""Where nothing is drafted, every so many steps one sequence is for some steps, to see whether that is still right."""


class AdaptiveLength:
    """A ``LengthPolicy`` that maximises the expected rate of tokens. It reads no clock: it is told what drafts took.

    Args:
        costs: of a step's parts, as measured at start.
        stops_early: whether chains can end before their limit; otherwise they are as long as is best on average.
    """

    def __init__(self, costs: StepCosts, *, stops_early: bool) -> None:
        self._costs, self._stops_early = ServedCosts(costs), stops_early
        self._acceptance = Acceptance()
        self._drafted_share = 1.0
        """Of the sequences, with fading memory."""
        self._idle_steps = 0
        self._idle_batch: tuple[list[str], int] | None = None
        """The sequences, and how many join them, for whom no draft was found to pay; nothing was observed since."""
        self._quiet_batch: tuple[list[str], int] = [], 0
        """The same of the last step, and for how many it has had neither drafts nor copies:"""
        self._quiet_steps = 0
        self._plan = Plan([], 0.0)
        """The last one, those that join included."""
        self._planned: dict[str, int] = {}
        """Its lengths by sequence."""
        self._sequences: dict[str, Draftable] = {}
        """Those of the step, by request."""
        self._expected_seconds = 0.0
        """That drafting takes in this step."""

    @property
    def drafts_for_most(self) -> bool:
        """Whether of late most sequences were drafted for."""
        return self._drafted_share >= 0.5

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
        self._sequences = {one.request_id: one for one in sequences}
        lengths = self._plan_lengths(sequences, num_joining)
        if any(lengths):
            self._idle_steps = 0
        else:
            self._idle_steps += 1
            self._costs.idle()
            self._probe(lengths, [one.limit for one in sequences])
        self._planned = dict(zip(self._sequences, lengths, strict=True))
        for request_id, length in self._planned.items():
            if length == 0:
                self._acceptance.idle(request_id)
        if lengths:
            self._drafted_share += (sum(map(bool, lengths)) / len(lengths) - self._drafted_share) * _SHARE_RATE
        copied = self._worth_copying()
        most = [
            copied.get(one.request_id, one.limit if length and self._stops_early else length)
            for one, length in zip(sequences, lengths, strict=True)
        ]
        if any(most):
            self._quiet_steps = 0
        return DraftLengths(most, frozenset(copied))

    def _plan_lengths(self, sequences: Sequence[Draftable], num_joining: int) -> list[int]:
        batch = (list(self._sequences), num_joining)
        if self._idle_steps >= _PROBE_STEPS and batch == self._idle_batch and self._idle_steps % _IDLE_INTERVAL:
            return [0] * len(sequences)
        chances = [self._chances(one, len(sequences) + num_joining) for one in sequences]
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
        return StopRule(
            chances=self._acceptance.of_levels(),
            acceptance={name: self._of_places(name, length) for name, length in lengths.items()},
            verify_costs=verify_costs,
            draft_cost=rate * self._costs.next_draft(count),
            planned={name: self._planned[name] for name in lengths},
        )

    def worth_verifying(self, chains: Mapping[str, Chain]) -> dict[str, int]:
        """How many of each chain's tokens to verify; those without sureness are left as they are."""
        drafted = {name: len(chain.token_ids) for name, chain in chains.items() if not chain.copied}
        unread = sum(self._sequences[name].num_unread for name in drafted)
        self._expected_seconds = self._draft_seconds(list(drafted.values())) + unread * self._costs.read
        left = {request_id: len(chain.token_ids) for request_id, chain in chains.items() if not chain.sureness}
        chains = {request_id: chain for request_id, chain in chains.items() if chain.sureness}
        chances = [
            all_before(self._acceptance.of_drafts(chain.sureness, greedy=chain.greedy, copied=chain.copied))
            for chain in chains.values()
        ]
        chances += [[]] * (len(self._plan.lengths) - len(chances))
        lengths = best_verified(self._costs.verify, chances, self._expected_seconds)
        return left | dict(zip(chains, lengths, strict=False))

    def observe(self, request_id: str, chain: Chain, outcomes: Sequence[bool], repeat: Repeat | None) -> None:
        """What became of a chain, place by place up to the first that the target did not choose."""
        if not chain.copied:
            self._idle_batch = None
            self._acceptance.observe(request_id, outcomes, chain.sureness, chain.greedy, _level(repeat))

    def observe_repeat(self, repeat: Repeat, outcomes: Sequence[bool]) -> None:
        """What became, or would have become, of a copy."""
        self._acceptance.observe_copy(outcomes, repeat.levels, repeat.greedy)

    def observe_seconds(self, seconds: float) -> None:
        """What the step's drafts took, and what vocabularies learned of them."""
        self._costs.observe(self._expected_seconds, seconds)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._acceptance.forget(request_id)
        self._idle_batch = None  # a batch with another request of that name is another batch

    def _chances(self, sequence: Draftable, num_sequences: int) -> list[float]:
        """For ``best_plan``; none where they are not worth reading the sequence's text."""
        chances = all_before(self._of_places(sequence.request_id, sequence.limit))
        return chances if worth_reading(self._costs, num_sequences, chances, sequence.num_unread) else []

    def _of_places(self, request_id: str, limit: int) -> list[float]:
        return self._acceptance.of_places(request_id, limit, _level(self._sequences[request_id].repeat))

    def _worth_copying(self) -> dict[str, int]:
        """How much to copy for each sequence for which that promises more than its drafts do.

        One sequence at a time, what is planned for the others being as it is.
        """
        worth = {}
        num_tokens = len(self._plan.lengths) + sum(self._planned.values())
        num_drafting = sum(map(bool, self._planned.values()))
        for request_id, sequence in self._sequences.items():
            if (one := sequence.repeat) is None:
                continue
            others = num_tokens - self._planned[request_id]
            chances = all_before(self._acceptance.of_drafts(one.levels, greedy=one.greedy, copied=True))
            gains = list(accumulate(chances, initial=0.0))
            worths = [gain - self._in_tokens(others, number) for number, gain in enumerate(gains)]
            length = max(range(len(worths)), key=worths.__getitem__)
            if worths[length] > max(self._worth_of_drafts(request_id, others, num_drafting), _MIN_WORTH):
                worth[request_id] = length
        return worth

    def _worth_of_drafts(self, request_id: str, others: int, num_drafting: int) -> float:
        planned = self._planned[request_id]
        if planned == 0:
            return 0.0
        expected = sum(all_before(self._of_places(request_id, planned)))
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

    def _probe(self, lengths: list[int], limits: Sequence[int]) -> None:
        if self._idle_steps % _PROBE_INTERVAL >= _PROBE_STEPS or self._idle_steps < _PROBE_INTERVAL:
            return
        best_case = [[MAX_ACCEPTANCE ** (place + 1) for place in range(limit)] for limit in limits]
        if any(best_plan(self._costs, best_case).lengths):
            chosen = max(range(len(limits)), key=lambda index: limits[index])
            lengths[chosen] = min(limits[chosen], _PROBE_TOKENS)


def _level(repeat: Repeat | None) -> int | None:
    return None if repeat is None else repeat.levels[0]
