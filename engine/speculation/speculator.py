"""The engine's side of speculation: how many tokens to draft, who drafts them, and the time that takes.

All of it is optional. What raises is counted by ``OptionalParts`` under the name of its part: "draft" (who proposes),
"lookup" (prompt lookup), "lengths" (how many tokens to draft), "vocabulary" (the sessions' words and priors) and "log"
(the token log and its features). The requests go on without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import structlog
import torch

from evospec.engine.batch import Features
from evospec.engine.config import MAX_COPIED_TOKENS, MAX_SPECULATIVE_TOKENS
from evospec.engine.draft_vocab.vocab import DraftVocab, most_likely
from evospec.engine.messages import EngineStats, TokenLogprob, TokenSource, VocabularyCounts
from evospec.engine.optional_parts import OptionalParts
from evospec.engine.request import Request
from evospec.engine.sampling.choose import is_greedy
from evospec.engine.speculation.drafters.base import Proposer
from evospec.engine.speculation.drafters.lookup import PromptLookup, are_predicted
from evospec.engine.speculation.length.policy import Chain, Copy, LengthPolicy
from evospec.engine.step_plan import DraftSlot, SchedulerOutput
from evospec.engine.verification import Verification

log = structlog.get_logger(__name__)

_ALARM_CHAINS = 200
"""Chains of draft tokens that are looked at together."""
_SUSPICIOUS = 1.2
"""Mean tokens a verification, with the target's own, below which something is wrong: a poor draft has 1.5."""


class Speculator:
    """Drafts for the engine's steps, by a proposer, a policy of lengths and the sequences' vocabularies.

    Args:
        proposer: drafts.
        policy: decides lengths.
        max_tokens: most draft tokens of a sequence and step.
        vocab_size: of the target; no draft token may have a larger id.
        lookup: finds what may be copied instead of drafted; None: nothing is.
        vocab: the vocabularies of running sequences; None where all draft from the same.
    """

    def __init__(
        self,
        proposer: Proposer,
        policy: LengthPolicy,
        max_tokens: int,
        vocab_size: int,
        lookup: PromptLookup | None = None,
        vocab: DraftVocab | None = None,
    ) -> None:
        self._proposer, self._policy, self._max_tokens, self._vocab_size = proposer, policy, max_tokens, vocab_size
        self.parts = OptionalParts()
        self._lookup, self._vocab = lookup, vocab
        self._verify_log, self._whole_draft = proposer.verify_log, proposer.whole_draft
        self.capture_layers = proposer.capture_layers
        """The target's layers whose output ``learn`` wants."""
        self._alarm = AcceptanceAlarm()
        self._drafting_seconds: float | None = None
        """Of this step; None: nothing is drafted in it."""

    def draft_lengths(self, requests: Sequence[Request], limits: Sequence[int], num_joining: int) -> list[int]:
        """As many tokens as the policy wants within every limit: the scheduler's, the engine's and the request's."""
        none = [0] * len(requests)
        if self.parts.is_off("draft"):
            return none
        lengths = self.parts.call("lengths", none, self._draft_lengths, requests, limits, num_joining)
        return [max(0, min(length, limit)) for length, limit in zip(lengths, limits, strict=True)]

    def _draft_lengths(self, requests: Sequence[Request], limits: Sequence[int], num_joining: int) -> list[int]:
        sequences = [request.draft_state.draftable for request in requests]
        if self._policy.rests(sequences):
            return [0] * len(requests)
        most = [_most_copied(request, limit) for request, limit in zip(requests, limits, strict=True)]
        copies: list[Copy | None] = [None] * len(requests)
        if self._lookup is not None:
            copies = self.parts.call("lookup", copies, self._lookup.look, requests, most)
        has_draft = [True] * len(requests) if self._whole_draft is None else self._whole_draft.find_draft(requests)
        for request, one, limit, copy, drafts in zip(requests, sequences, most, copies, has_draft, strict=True):
            request.draft_state.copy = copy
            one.tenant, one.num_unread = request.tenant, self._proposer.num_unread(request)
            one.limit = min(limit, self._max_tokens) if drafts else 0
            one.greedy, one.repeat = is_greedy(request.sampling), () if copy is None else copy.levels
        lengths = self._policy.lengths(sequences, num_joining)
        if len(lengths) != len(requests):
            raise ValueError(f"{len(lengths)} lengths for {len(requests)} sequences")
        return lengths

    def draft(self, slots: Sequence[DraftSlot]) -> None:
        """Write ``request.draft_token_ids``, as far as the policy finds it worth while; none where that fails."""
        if not self.parts.call("draft", False, self._draft, slots):
            for slot in slots:
                slot.request.draft_token_ids = []
                slot.request.draft_state.begin_step()

    def _draft(self, slots: Sequence[DraftSlot]) -> bool:
        """Always True: the drafts are there."""
        started = time.perf_counter()
        wanted, drafting = [slot for slot in slots if slot.num_tokens], []
        for slot in wanted:
            state = slot.request.draft_state
            state.begin_step()
            if state.copy is not None and state.draftable.is_copied:
                state.source = "lookup"
                slot.request.draft_token_ids += state.copy.token_ids[: slot.num_tokens]
                state.confidence = state.copy.levels[: slot.num_tokens]
            else:
                state.source = self._proposer.source
                drafting.append(slot)
        if drafting:
            sequences = [slot.request.draft_state.draftable for slot in drafting]
            rule = self._policy.stop_rule(sequences, [slot.num_tokens for slot in drafting])
            self._proposer.propose(drafting, rule)
        for slot in wanted:
            _check(slot, self._vocab_size)
        self._cut([slot.request for slot in wanted if slot.request.draft_token_ids])
        has_drafts = any(slot.request.draft_token_ids for slot in drafting)
        self._drafting_seconds = time.perf_counter() - started if has_drafts else None
        _drop_forbidden([slot.request for slot in wanted])
        return True

    def _cut(self, requests: Sequence[Request]) -> None:
        """Keep the whole chains, and of each request's drafts what is worth verifying."""
        if not requests:
            return
        chains = []
        for request in requests:
            request.draft_state.chain = chain = Chain(request.draft_token_ids, request.draft_state.confidence)
            chains.append(chain)
        whole = [len(chain.token_ids) for chain in chains]
        sequences = [request.draft_state.draftable for request in requests]
        lengths = self.parts.call("lengths", whole, self._policy.worth_verifying, sequences, chains)
        for request, length in zip(requests, lengths, strict=True):  # another list: the chain keeps this one
            request.draft_token_ids = request.draft_token_ids[:length]

    def learn(self, verified: Sequence[Verification], logits: torch.Tensor, features: Features | None) -> float:
        """Follow a verified step, before it is committed.

        Args:
            verified: all its sequences.
            logits: [L, vocab] float32, as the target has computed them; may be lost in this call.
            features: of all its tokens; None without capture.

        Returns:
            The seconds that vocabularies took.
        """
        call = self.parts.call
        sequences, num_chosen = [one.sequence for one in verified], [one.num_chosen for one in verified]
        call("draft", None, self._proposer.after_verification, sequences, num_chosen, features)
        first_right = call("lengths", {}, self._judge, verified)
        likely = None
        if self._verify_log is not None:
            likely = call("log", None, self._verify_log.write, verified, logits, first_right)
        seconds = 0.0
        if self._vocab is not None:
            started = time.perf_counter()
            top_k = likely or most_likely(logits)
            call("vocabulary", None, self._vocab.follow, verified, top_k, self._may_never_draft)
            seconds = time.perf_counter() - started
        if self._drafting_seconds is not None:
            call("lengths", None, self._policy.record_seconds, self._drafting_seconds + seconds)
            self._drafting_seconds = None  # the next step may have nothing to draft for, and then nobody is asked
        return seconds

    def record_step(self, plan: SchedulerOutput, seconds: float, without_drafts: float) -> None:
        """A step is over that took so long, and so long without its drafts."""
        if not plan.num_prompt_tokens:
            self.parts.call("lengths", None, self._policy.record_step, plan.num_tokens, without_drafts)
        if self._verify_log is not None:
            self.parts.call("log", None, self._verify_log.record_step, seconds)

    def _may_never_draft(self, request: Request) -> bool:
        """Whether a new request gets a vocabulary only when it is drafted for, because that may well never be."""
        return not self._policy.drafts_for_most(request.tenant)

    def _judge(self, verified: Sequence[Verification]) -> dict[str, bool | None]:
        """Tell the policy what became of the drafts.

        The target's last choice judges the first draft that was not verified too, so that it costs nothing to leave one
        out and still learn whether that was right.

        Returns:
            of the requests with a chain, whether its first token was right; None: it was copied.
        """
        first_right: dict[str, bool | None] = {}
        for one in verified:
            request = one.sequence.request
            state = request.draft_state
            chain, copy = state.chain, state.copy
            state.chain = state.copy = None
            if not one.kept:
                continue
            if copy is not None:
                self._policy.record_copy(state.draftable, _outcomes(copy.token_ids, one.kept))
            if chain is not None:
                outcomes, is_copied = _outcomes(chain.token_ids, one.kept), state.draftable.is_copied
                self._policy.record_drafts(state.draftable, chain, outcomes)
                first_right[request.request_id] = None if is_copied else outcomes[0]
                if not is_copied and state.source == "draft":
                    self._alarm.record(sum(outcomes))
        return first_right

    def with_sources(self, one: Verification, entries: list[TokenLogprob]) -> list[TokenLogprob]:
        """The log-probabilities of a committed step's tokens, with who proposed each of them."""
        return self.parts.call("vocabulary", entries, self._with_sources, one, entries)

    def _with_sources(self, one: Verification, entries: list[TokenLogprob]) -> list[TokenLogprob]:
        sources = [self._source(one, *accepted) for accepted in zip(one.kept, are_predicted(one), strict=False)]
        named = zip(entries, sources, strict=False)
        accepted = [msgspec.structs.replace(entry, source=source) for entry, source in named]
        return accepted + entries[one.num_accepted :]

    def _source(self, one: Verification, token_id: int, is_predicted: bool) -> TokenSource:
        """Who proposed an accepted token."""
        if one.source == "lookup":
            return "prediction" if is_predicted else "copied"
        return "draft" if self._vocab is None or self._vocab.in_core(token_id) else "session"

    def add_stats(self, stats: EngineStats) -> EngineStats:
        """The engine's statistics with those of speculation."""
        if self._verify_log is not None:
            stats = msgspec.structs.replace(stats, alignment=self.parts.call("log", None, self._verify_log.stats))
        stats = msgspec.structs.replace(stats, faults=self.parts.faults, switched_off=self.parts.switched_off)
        if self._vocab is None:
            return stats
        return msgspec.structs.replace(
            stats,
            vocabularies_used=self._vocab.num_used,
            vocabularies_total=self._vocab.num_total,
            snapshots_refused=self._vocab.num_refused_snapshots,
        )

    def finish(self, request: Request) -> tuple[bytes | None, VocabularyCounts | None]:
        """A request has ended, its last tokens are committed: the snapshot of its session, and how its drafts fared."""
        return (
            (None, None)
            if self._vocab is None
            else self.parts.call("vocabulary", (None, None), self._vocab.finish, request)
        )

    def preempted(self, request: Request) -> None:
        """A request has lost its blocks; it comes back."""
        request.draft_state.chain = request.draft_state.copy = None
        self._leave(request)

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._leave(request)
        if self._lookup is not None:
            self.parts.clean_up("lookup", self._lookup.forget, request)
        if self._vocab is not None:
            self.parts.clean_up("vocabulary", self._vocab.forget, request)

    def _leave(self, request: Request) -> None:
        """A request gives its blocks back."""
        if self._verify_log is not None:
            self.parts.clean_up("log", self._verify_log.forget, request)
        self.parts.clean_up("draft", self._proposer.forget, request)


def _most_copied(request: Request, limit: int) -> int:
    """Most tokens that may be copied for a request within the scheduler's limit.

    Grammars have masks for fewer, and slow ones for none but the next token.
    """
    if request.grammar is not None and request.grammar.is_slow:
        return 0
    most = MAX_COPIED_TOKENS if request.grammar is None else MAX_SPECULATIVE_TOKENS
    asked = request.sampling.num_speculative_tokens
    return min(limit, most if asked is None else min(asked, most))


def _check(slot: DraftSlot, vocab_size: int) -> None:
    """Raises ``ValueError`` for drafts that the target cannot compute: other ids than it has, or more than fit."""
    drafts = slot.request.draft_token_ids
    if len(drafts) > slot.num_tokens or (drafts and not 0 <= min(drafts) <= max(drafts) < vocab_size):
        raise ValueError(f"{len(drafts)} draft tokens where {slot.num_tokens} fit, or ids that no token has")


def _drop_forbidden(requests: Sequence[Request]) -> None:
    """Cut drafts off before the first that a grammar forbids. The masks that tell are needed anyway."""
    for request in requests:
        if request.grammar is not None:
            request.draft_token_ids = request.grammar.allowed(request.draft_token_ids)


def _outcomes(drafts: Sequence[int], chosen: Sequence[int]) -> list[bool]:
    """Whether each draft is what the target chose, up to the first that is not."""
    outcomes = [draft == token_id for draft, token_id in zip(drafts, chosen, strict=False)]
    return outcomes[: outcomes.index(False) + 1] if False in outcomes else outcomes


class AcceptanceAlarm:
    """Warns the operator, once, of a draft that is hardly ever right.

    Such a draft costs time and no answer: most often it takes the outputs of the wrong layers.
    """

    def __init__(self) -> None:
        self._num_chains = self._num_right = 0
        self._has_warned = False

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
