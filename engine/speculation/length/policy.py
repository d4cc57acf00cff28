"""What decides how many tokens are drafted for each sequence of a step, how many are verified, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from evospec.engine.learner import Learner
from evospec.engine.request import Request
from evospec.engine.step import Copy, Proposal, Step, StepClock
from evospec.kernels.native_chain import StopRule


class Candidate(msgspec.Struct, frozen=True):
    """A decoding sequence that may be drafted for in a step."""

    request: Request
    limit: int
    """Most tokens that may be drafted, if none is copied."""
    num_unread: int = 0
    """How many of its tokens its draft has to read before it can draft."""
    copy: Copy | None = None
    """What may be copied in place of drafts; None where its end does not repeat."""

    @property
    def repeat(self) -> Sequence[int]:
        """How sure each token is that may be copied, a level each."""
        return () if self.copy is None else self.copy.levels


class Length(msgspec.Struct, frozen=True):
    """What a sequence gets in a step: room for so many draft tokens, which are its draft's, or copied."""

    num_tokens: int
    is_copied: bool = False


@dataclass(frozen=True)
class EarlyStop:
    """When the chains of a step end before the room that they have."""

    rule: StopRule
    tenants: Mapping[Request, int]
    """Which of the rule's tenants each sequence is of."""
    acceptance: Mapping[Request, Sequence[float]]
    """Of each, by place, how likely a draft is right, given that those before it are."""


class LengthPolicy(Learner):
    """Decides how many tokens to draft: always as many as allowed, where a subclass does not say otherwise.

    Within a step: ``rests``, ``lengths``, ``stop_rule``, ``worth_verifying``, ``learn`` and ``measured``.
    """

    part = "lengths"

    def drafts_for_most(self, tenant: str) -> bool:
        """Whether of late most of a tenant's sequences were drafted for: else what drafts need is made at the first."""
        return True

    def rests(self, num_sequences: int) -> bool:
        """Whether the decoding sequences of a step get no drafts, whatever repeats in them."""
        return False

    def lengths(self, candidates: Sequence[Candidate], num_joining: int) -> list[Length]:
        """Most draft tokens of all decoding sequences of a step, which ``num_joining`` more are about to join."""
        return [Length(one.limit) for one in candidates]

    def stop_rule(self, lengths: Mapping[Request, int]) -> EarlyStop | None:
        """When the chains of sequences end that have room for so many tokens; None: never before."""
        return None

    def worth_verifying(self, proposals: Mapping[Request, Proposal]) -> list[int]:
        """How many tokens of each to verify; those without confidence are left as they are."""
        return [len(proposal.token_ids) for proposal in proposals.values()]

    def record_drafts(self, request: Request, proposal: Proposal, outcomes: Sequence[bool]) -> None:
        """What became of what was drafted, place by place up to the first that the target did not choose."""

    def record_copy(self, request: Request, copy: Copy, outcomes: Sequence[bool]) -> None:
        """What became, or would have become, of what could be copied in this step."""

    def record_seconds(self, seconds: float) -> None:
        """What a step's drafts took, and what vocabularies learned of them; of the chains last cut."""

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """What a step without prompts took that verified so many tokens, its drafts left out."""

    def learn(self, step: Step) -> None:
        for one in step.verified:
            proposal = one.sequence.proposal
            if not one.kept:
                continue
            if proposal.copy is not None:
                self.record_copy(one.request, proposal.copy, one.outcomes(proposal.copy.token_ids))
            if proposal.drafted:
                self.record_drafts(one.request, proposal, one.outcomes(proposal.drafted))

    def measured(self, step: Step, clock: StepClock) -> None:
        proposals = (sequence.proposal for sequence in step.batch.sequences)
        if any(proposal.token_ids and not proposal.is_copied for proposal in proposals):
            self.record_seconds(clock["propose"] + clock["vocabulary"])
        if not step.batch.num_prompt_tokens:
            self.record_step(step.batch.num_tokens, clock.seconds - clock.speculation)
