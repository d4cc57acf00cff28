"""Who drafts in a step: a draft, or prompt lookup where that promises more, as many tokens as are worth it."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from evospec.engine.config import MAX_COPIED_TOKENS, MAX_SPECULATIVE_TOKENS
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.learner import Drafter, Learner
from evospec.engine.messages import TokenSource
from evospec.engine.optional_parts import OptionalParts
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import Proposer
from evospec.engine.speculation.drafters.lookup import PromptLookup
from evospec.engine.speculation.length.policy import Candidate, Length, LengthPolicy
from evospec.engine.step import Copy, Decodes, DraftSlot, Proposal, Proposals, Step

log = structlog.get_logger(__name__)

_ALARM_CHAINS = 200
"""Chains of draft tokens that are looked at together."""
_SUSPICIOUS = 1.2
"""Mean tokens a verification, with the target's own, below which something is wrong: a poor draft has 1.5."""


class Speculator(Drafter):
    """Drafts by a proposer, a policy of lengths, and lookup.

    Faults of policy and lookup are counted as those of parts of their own, "lengths" and "lookup": without the first
    nothing is drafted, or all that there is room for; without the other the draft goes on.

    Args:
        proposer: drafts.
        policy: decides lengths.
        max_tokens: most draft tokens of a sequence and step.
        parts: the engine's.
        lookup: finds what may be copied instead of drafted; None: nothing is.
        vocab: the vocabularies of running sequences; None where all draft from the same.
    """

    def __init__(
        self,
        proposer: Proposer,
        policy: LengthPolicy,
        max_tokens: int,
        parts: OptionalParts,
        lookup: PromptLookup | None = None,
        vocab: DraftVocab | None = None,
    ) -> None:
        self._proposer, self._policy, self._max_tokens, self._parts = proposer, policy, max_tokens, parts
        self._lookup, self._vocab, self._whole_draft = lookup, vocab, proposer.whole_draft
        self._copies: dict[Request, Copy] = {}
        """What could be copied in this step."""
        self._copied: set[Request] = set()
        """For whom it is."""

    def lengths(self, decodes: Decodes) -> list[int]:
        """As many tokens as the policy wants within the limits of the sequence, of the engine and of its request."""
        none = [0] * len(decodes.requests)
        self._copies, self._copied = {}, set()
        lengths = self._parts.call("lengths", none, self._lengths, decodes)
        return [max(0, min(length, limit)) for length, limit in zip(lengths, decodes.limits, strict=True)]

    def _lengths(self, decodes: Decodes) -> list[int]:
        requests = decodes.requests
        if self._policy.rests(len(requests)):
            return [0] * len(requests)
        most = [_most_copied(request, limit) for request, limit in zip(requests, decodes.limits, strict=True)]
        copies: list[Copy | None] = [None] * len(requests)
        if self._lookup is not None:
            copies = self._parts.call("lookup", copies, self._lookup.look, requests, most)
        has_draft = [True] * len(requests) if self._whole_draft is None else self._whole_draft.find_draft(requests)
        candidates = []
        for request, limit, copy, drafts in zip(requests, most, copies, has_draft, strict=True):
            if copy is not None:
                self._copies[request] = copy
            of_draft = min(limit, self._max_tokens) if drafts else 0
            candidates.append(Candidate(request, of_draft, self._proposer.num_unread(request), copy))
        lengths: list[Length] = self._policy.lengths(candidates, decodes.num_joining)
        self._copied = {request for request, length in zip(requests, lengths, strict=True) if length.is_copied}
        return [length.num_tokens for length in lengths]

    def propose(self, slots: Sequence[DraftSlot]) -> Proposals:
        """Copies and drafts, as far as they are worth verifying, and all that could be copied."""
        proposals, drafting = dict[Request, Proposal](), list[DraftSlot]()
        for slot in slots:
            request, copy = slot.request, self._copies.get(slot.request)
            if copy is not None and request in self._copied and slot.num_tokens:
                count = slot.num_tokens
                confidence, predicted = copy.levels[:count], copy.predicted[:count]
                proposals[request] = Proposal(copy.token_ids[:count], "lookup", (), confidence, predicted=predicted)
            elif slot.num_tokens:
                drafting.append(slot)
        if drafting:
            rule = self._policy.stop_rule({slot.request: slot.num_tokens for slot in drafting})
            proposals |= self._proposer.propose(drafting, rule)
        for request, copy in self._copies.items():
            proposals.setdefault(request, Proposal()).copy = copy
        self._cut({request: proposal for request, proposal in proposals.items() if proposal.token_ids})
        return proposals

    def _cut(self, proposals: Proposals) -> None:
        """Keep the whole chains, and of each request's drafts what is worth verifying."""
        if not proposals:
            return
        whole = [len(proposal.token_ids) for proposal in proposals.values()]
        lengths = self._parts.call("lengths", whole, self._policy.worth_verifying, proposals)
        for proposal, length in zip(proposals.values(), lengths, strict=True):  # another list: the chain keeps this one
            proposal.drafted, proposal.token_ids = proposal.token_ids, proposal.token_ids[:length]

    def source(self, token_id: int) -> TokenSource:
        return "draft" if self._vocab is None or self._vocab.in_core(token_id) else "session"


def _most_copied(request: Request, limit: int) -> int:
    """Most tokens that may be copied for a request within the scheduler's limit.

    Grammars have masks for fewer, and slow ones for none but the next token.
    """
    if request.grammar is not None and request.grammar.is_slow:
        return 0
    most = MAX_COPIED_TOKENS if request.grammar is None else MAX_SPECULATIVE_TOKENS
    asked = request.sampling.num_speculative_tokens
    return min(limit, most if asked is None else min(asked, most))


class AcceptanceAlarm(Learner):
    """Warns the operator, once, of a draft that is hardly ever right.

    Such a draft costs time and no answer: most often it takes the outputs of the wrong layers.
    """

    part = "lengths"

    def __init__(self) -> None:
        self._num_chains = self._num_right = 0
        self._has_warned = False

    def learn(self, step: Step) -> None:
        for one in step.verified:
            proposal = one.sequence.proposal
            if one.kept and proposal.drafted and proposal.source == "draft":
                self.record(sum(one.outcomes(proposal.drafted)))

    def record(self, num_right: int) -> None:
        """A chain was verified, and so many of its first tokens were right."""
        self._num_chains, self._num_right = self._num_chains + 1, self._num_right + num_right
        if self._num_chains < _ALARM_CHAINS:
            return
        length = 1 + self._num_right / self._num_chains
        self._num_chains = self._num_right = 0
        if length < _SUSPICIOUS and not self._has_warned:
            self._has_warned = True
            hint = "is the draft for this model, and of which layers (speculation.capture_layers)?"
            log.warning(
                "the draft is hardly ever right", acceptance_length=round(length, 2), chains=_ALARM_CHAINS, hint=hint
            )
