"""The draft vocabularies of all running sequences: who has one, and what happens to it when.

Nothing here can change an output: a vocabulary decides what is drafted, and the target decides what is kept. What they
hold is in ``kernels.native_sessions``, which is called for whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.config import DynamicConfig
from evospec.engine.draft_vocab.past import SessionPast, TenantTables
from evospec.engine.draft_vocab.resources import Resources, session_options
from evospec.engine.draft_vocab.running_texts import NONE, RunningTexts
from evospec.engine.draft_vocab.step_ends import StepEnds
from evospec.engine.learner import Learner
from evospec.engine.messages import EngineOutput, EngineStats, VocabularyCounts
from evospec.engine.request import Request
from evospec.engine.step import Step, Verification
from evospec.kernels.native_sessions import LogitsOf, Sessions, TailWrites
from evospec.kernels.session_library import DraftStep, TokenRows

if TYPE_CHECKING:
    from evospec.engine.draft_vocab.semantic import SemanticSearch

_NEW_BY_SEARCH = 32
"""Tokens that a search puts into a tail, at most."""
_IN_BACKGROUND = 16
"""Sequences from which on another thread learns from a step: for fewer, to tell it takes as long as to learn."""
MOST_BEGUN = 8
"""Sequences that get a vocabulary when a step is drafted, and when it is followed: each takes up to two milliseconds,
and all others wait. The rest get theirs in later steps, and draft from the core until then."""
TOP_K = 10
"""How many of the target's most likely tokens at a place are looked at."""
TopK = Callable[[Sequence[int]], NDArray[np.int32]]
"""These, at some rows of a step's logits: [n, TOP_K], best first."""


@dataclass(eq=False, slots=True)
class _Vocabulary:
    """A sequence with a vocabulary."""

    slot: int
    num_read: int
    """How many of its tokens the vocabulary has read."""


class DraftVocab(Learner):
    """Gives running sequences a vocabulary each, as long as there is room, and keeps it in step with their text.

    One thread calls all methods. A sequence without a vocabulary drafts from the core, without a prior.
    """

    part = "vocabulary"

    def __init__(self, options: DynamicConfig, resources: Resources, texts: RunningTexts) -> None:
        self._options, self._resources, self.texts = options, resources, texts
        of_sessions = session_options(options, resources.slots)
        self.sessions = Sessions(of_sessions, resources.core, resources.graph if options.graph else None)
        self._draft_step = DraftStep((), ())
        """The rows whose draft tokens were chosen last."""
        self.num_total = options.max_sessions
        """Sequences that can have a vocabulary at the same time."""
        self._free = list(range(self.num_total))[::-1]
        self._tenants = TenantTables(self.sessions) if of_sessions.num_tenants else None
        self._past = SessionPast(options, resources, self.sessions)
        self._of: dict[Request, _Vocabulary] = {}
        self.begins_later: Callable[[Request], bool] = lambda _: False
        """Whether a request's first token does not bring it a vocabulary: it gets one when it is drafted for."""
        self._ends = StepEnds()
        self._waiting: list[TailWrites] = []
        """What tails are to hold when they are drafted from next: a step writes to them once."""
        self._search: SemanticSearch | None = None
        if resources.semantic is not None:
            from evospec.engine.draft_vocab.semantic import SemanticSearch  # which few want, and which takes a second

            self._search = SemanticSearch(resources.semantic)
        self.has_tails = resources.slots > 0
        """Whether sequences can have tokens of their own."""
        self.uses_prior = options.prior != "off"
        """Whether sequences have a prior."""
        self.keeps_hidden = resources.semantic is not None
        """Whether those that draft write ``Proposal.hidden``."""

    def in_core(self, token_id: int) -> bool:
        """Whether all sequences can draft a token."""
        return bool(self._resources.core[token_id])

    @property
    def num_used(self) -> int:
        """Sequences with a vocabulary."""
        return self.num_total - len(self._free)

    @property
    def num_refused_snapshots(self) -> int:
        """Snapshots that could not be used."""
        return self._past.num_refused_snapshots

    @property
    def num_bytes(self) -> int:
        """Memory of what as many sequences know as can have a vocabulary."""
        return self.num_total * (self.sessions.num_bytes + self.texts.texts.num_bytes)

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Made-up requests get vocabularies with full tails, to measure what those cost."""
        for request in requests:
            if self._start(request):
                everything = range(self.sessions.vocab_size)
                self._take(self.sessions.insert(self._of[request].slot, everything, "tenant"))

    def before_drafts(self, requests: Sequence[Request]) -> None:
        """Bring sequences up to date that are about to be drafted for."""
        self._take(self.sessions.begin_drafts())
        for request in [request for request in requests if request not in self._of][:MOST_BEGUN]:
            self._start(request)
        self._catch_up(requests)
        self._write_tails()
        if self.uses_prior:
            self.texts.read(requests)

    def slots(self, requests: Sequence[Request]) -> list[int]:
        """The slot in ``sessions`` of each request's vocabulary; NONE: it has none."""
        return [NONE if (one := self._of.get(request)) is None else one.slot for request in requests]

    def slabs(self, requests: Sequence[Request]) -> list[int]:
        """The tail of each request; of one without a vocabulary, a tail that is always empty."""
        slots = self.slots(requests)
        return slots if min(slots) != NONE else [self.num_total if one == NONE else one for one in slots]

    def choose_with_prior(
        self,
        requests: Sequence[Request],
        drafts: Sequence[list[int]],
        token_ids: torch.Tensor,
        logits: torch.Tensor,
        logits_of: LogitsOf,
    ) -> list[int]:
        """Add each session's prior to the candidates' logits, in place: the token of each row with the largest sum.

        Tokens that followed a repeat of the text's end become candidates, whatever the draft thinks of them.

        Args:
            requests: one a row. Those of a step's later tokens are among those of its first, in the same order.
            drafts: of each, the draft tokens before this one, as many for each.
            token_ids: [B, C] int32 on the CPU, -1 for none; the weakest make room, in place.
            logits: [B, C] float32 on the CPU, -inf for none.
            logits_of: for the tokens that become candidates; where it is NaN, that of the one that made room stays.
        """
        step = self._draft_step
        if not drafts[0] or len(step) != len(drafts):
            sessions, texts = self.slots(requests), self.texts.slots(requests)
            if sessions != step.sessions or texts != step.texts:  # seldom: made anew for other rows only
                step = self._draft_step = DraftStep(sessions, texts)
        step.go_on(drafts, token_ids, logits)
        self.sessions.score(self.texts.texts, step, logits_of)
        return step.best

    def learn(self, step: Step) -> None:
        self.follow(step.verified, lambda rows: step.top_k(rows, TOP_K)[1])

    def follow(self, verified: Sequence[Verification], top_k: TopK) -> None:
        """Follow a verified step. A sequence for which nothing was drafted is left for later: that is cheaper.

        Args:
            verified: all sequences of the step, not committed yet.
            top_k: called for rows where the target's own choices are wanted.
        """
        self._ends.clear()
        followed: list[Verification] = []
        num_begun = 0
        for one in verified:
            if not one.kept:
                continue
            request = one.sequence.request
            has_session = request in self._of
            is_followed = has_session and one.source == "draft"
            if not has_session and not request.output_token_ids:
                is_followed = num_begun < MOST_BEGUN and not self.begins_later(request) and self._start(request)
                num_begun += is_followed
                if history := self._past.history(request):  # is copied from, with a vocabulary or without
                    self.texts.put_before(request, history)
            if is_followed:
                followed.append(one)
        if followed:
            self._catch_up([one.sequence.request for one in followed])
            self._learn(followed, top_k)
        for request, token_ids in self._search.take() if self._search is not None else ():
            if (vocabulary := self._of.get(request)) is not None:
                self._take(self.sessions.insert(vocabulary.slot, token_ids, "semantic", _NEW_BY_SEARCH))

    def _learn(self, verified: Sequence[Verification], top_k: TopK) -> None:
        """Take tokens of sequences that are up to date, and put into their tails what is likely to come."""
        rows = TokenRows()
        for one in verified:
            request, kept = one.sequence.request, one.kept
            text = self.texts.take(request, len(kept))
            self._add(rows, request, kept, text, one.num_accepted, one.sequence.num_draft_tokens)
        missed = self.sessions.missed(rows, self.texts.texts)
        signal = self._options.target_signal
        chosen, likely = [], None
        if self.has_tails:
            chosen = [row for row, first in enumerate(missed) if first >= 0 or signal == "every"]
        if chosen and signal != "off":
            likely = top_k([place for row in chosen for place in verified[row].rows])
        self.sessions.learn(rows, chosen, likely, in_background=len(rows) >= _IN_BACKGROUND)
        if self._search is not None:
            for row in chosen:
                hidden, place = verified[row].sequence.proposal.hidden, missed[row]
                if 0 <= place < len(hidden):  # from there a token should have been drafted, but could not
                    self._search.ask(verified[row].request, hidden[place])

    def finish(self, request: Request, output: EngineOutput) -> EngineOutput:
        """A request's last output, with what its session keeps of it, and its counts."""
        snapshot, counts = self.leave(request)
        return msgspec.structs.replace(output, session_snapshot=snapshot, vocabulary=counts)

    def leave(self, request: Request) -> tuple[bytes | None, VocabularyCounts | None]:
        """A request has ended, and its last tokens are committed: what its session keeps of it, and its counts.

        Both are None where there is no room for a vocabulary; the first also where enough have ended in this step.
        """
        is_kept = request.session is not None and self._ends.take(request, has_vocabulary=request in self._of)
        if is_kept and request not in self._of:
            self._start(request)  # nothing may have been drafted for it, but its session is to know of it
        if request not in self._of:
            return None, None
        self._catch_up([request])
        slot = self._of[request].slot
        self._past.remember(slot, request)
        counts = self.sessions.counts(slot)
        fared = VocabularyCounts(
            tail_tokens=len(self.sessions.tail(slot)),
            verified_tokens=counts.verified,
            covered_tokens=counts.covered,
            events=counts.events,
            insertions=counts.by_source("insertions"),
            hits=counts.by_source("hits"),
        )
        return self._past.pack(slot, request) if is_kept else None, fared

    def end(self, request: Request) -> None:
        self._past.end(request)
        one = self._of.pop(request, None)
        if one is None:
            return
        self._take(self.sessions.take_writes())
        if self._resources.tails is not None:
            of_others = (writes[writes[:, 0] != one.slot] for writes in self._waiting)
            self._waiting = [writes for writes in of_others if len(writes)]
            self._resources.tails.clear(one.slot)
        self._free.append(one.slot)

    def add_stats(self, stats: EngineStats) -> EngineStats:
        return msgspec.structs.replace(
            stats,
            vocabularies_used=self.num_used,
            vocabularies_total=self.num_total,
            snapshots_refused=self.num_refused_snapshots,
        )

    def prior_weights(self, requests: Sequence[Request]) -> NDArray[np.float32] | None:
        """[n, NUM_FEATURES] with which sequences are drafted for, 0 without a vocabulary; None: there are no priors."""
        if not self.uses_prior:
            return None
        slots = np.array(self.slots(requests))
        weights = self.sessions.applied_weights(slots)
        weights[slots == NONE] = 0.0
        return weights

    def _start(self, request: Request) -> bool:
        """Make the vocabulary of a sequence that has none yet, if there is room; whether it has one."""
        if not self._free:
            return False
        one = self._of[request] = _Vocabulary(self._free.pop(), request.num_tokens)
        past, of_tenant = self._past.begin(one.slot, request)
        self._take(self.sessions.begin(one.slot, request.all_token_ids, past, of_tenant))
        return True

    def _catch_up(self, requests: Sequence[Request]) -> None:
        """Let vocabularies read what they have not seen: tokens of steps in which somebody else drafted."""
        behind = [
            request
            for request in requests
            if (one := self._of.get(request)) is not None and one.num_read < len(request.all_token_ids)
        ]
        if behind:
            rows = TokenRows()
            for request in behind:
                self._add(rows, request, request.all_token_ids[self._of[request].num_read :])
            self._take(self.sessions.catch_up(rows))

    def _add(self, rows: TokenRows, request: Request, tokens: Sequence[int], *others: int) -> None:
        one, table = self._of[request], NONE if self._tenants is None else self._tenants.of(request.tenant)
        rows.add(one.slot, tokens, table, *others)
        one.num_read += len(tokens)

    def _take(self, writes: TailWrites) -> None:
        if len(writes) and self._resources.tails is not None:
            self._waiting.append(writes)

    def _write_tails(self) -> None:
        """All that waits, in one call; of two tokens for a slot the later one."""
        if not self._waiting or self._resources.tails is None:
            return
        writes = np.concatenate(self._waiting)
        if len(self._waiting) > 1:
            places = writes[:, 0].astype(np.int64) * self._resources.slots + writes[:, 1]
            _, from_end = np.unique(places[::-1], return_index=True)
            writes = writes[len(writes) - 1 - from_end]
        self._waiting.clear()
        self._resources.tails.write(*writes.T)
