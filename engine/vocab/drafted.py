"""What the draft tokens that are being verified were chosen from, with which prior; and what it learns of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.request import Request
from engine.sampling.choose import warmth
from engine.vocab.draft_prior import Drafted, DraftPrior, drafted_rows, last_two
from engine.vocab.prior import Candidates
from engine.vocab.session_vocab import SessionVocab
from engine.vocab.verified import VerifiedSequence
from kernels.native_prior import ChainPrior, PriorKernel


@dataclass(slots=True)
class _Drafts:
    """Of one sequence: what the draft tokens that are being verified were chosen from, in order."""

    candidates: list[Drafted] = field(default_factory=list)
    hidden: list[NDArray[np.float32]] = field(default_factory=list)


class DraftedTokens:
    """Remembers candidates from the draft to its verification, sequence by sequence.

    Args:
        prior: None: none.
        sessions: of the sequences that have a vocabulary; only their drafts are remembered.
        wants_hidden: whether somebody asks for ``hidden``.
    """

    def __init__(self, prior: DraftPrior | None, sessions: Mapping[str, SessionVocab], *, wants_hidden: bool) -> None:
        self._prior, self._sessions, self.wants_hidden = prior, sessions, wants_hidden
        self._drafts: dict[str, _Drafts] = {}

    def begin(self, request_id: str) -> None:
        """A sequence's next draft begins; what was remembered of the last one is dropped."""
        self._drafts[request_id] = _Drafts()

    def hidden(self, request_id: str) -> list[NDArray[np.float32]]:
        """The states [d] from which a sequence's draft tokens were chosen."""
        return self._drafts[request_id].hidden

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._drafts.pop(request_id, None)

    @property
    def prior_kernel(self) -> PriorKernel | None:
        """The compiled prior, if there is one."""
        return None if self._prior is None else self._prior.kernel

    def prior_weights(self, request_id: str) -> NDArray[np.float32] | None:
        """[NUM_FEATURES] with which a sequence is drafted for; None: without a prior."""
        vocab = self._sessions.get(request_id)
        return None if vocab is None or self._prior is None else self._prior.applied(vocab)

    def include_matches(
        self,
        requests: Sequence[Request],
        token_ids: NDArray[np.int32],
        logits: NDArray[np.float32],
        logits_of: Callable[[int, Sequence[int]], NDArray[np.float32]],
    ) -> None:
        """Make tokens that followed a repeat of the text's end candidates, whatever the draft thinks of them.

        Args:
            requests: one a row.
            token_ids: [B, C]; the weakest make room, in place.
            logits: [B, C], likewise.
            logits_of: of any tokens of a row.
        """
        if self._prior is None or not self._prior.uses_matches:
            return
        for row, request in enumerate(requests):
            vocab = self._sessions.get(request.request_id)
            if vocab is None:
                continue
            candidates: list[int] = token_ids[row].tolist()
            end = len(candidates)
            for token_id in vocab.text.find(request.draft_token_ids):
                if end and token_id not in candidates[:end]:
                    end -= 1
                    candidates[end] = token_id
            if included := candidates[end:]:
                token_ids[row, end:], logits[row, end:] = included, logits_of(row, included)

    def with_prior(
        self, requests: Sequence[Request], token_ids: NDArray[np.int32], logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The candidates' logits with each session's prior; they are remembered until they are verified.

        Args:
            requests: one a row; drafts before this one are in their ``draft_token_ids``. ``slabs`` came before.
            token_ids: [B, C], -1 for none.
            logits: [B, C], -inf for none.
        """
        rows = [row for row, request in enumerate(requests) if request.request_id in self._sessions]
        if self._prior is None or not rows:
            return logits
        ids = [requests[row].request_id for row in rows]
        of_sessions = (token_ids, logits) if len(rows) == len(requests) else (token_ids[rows], logits[rows])
        contexts, drafts = zip(*((last_two(requests[row]), requests[row].draft_token_ids) for row in rows), strict=True)
        greedy = _are_greedy([requests[row] for row in rows])
        scores, drafted = self._prior.score(
            [self._sessions[one] for one in ids], contexts, drafts, *of_sessions, greedy
        )
        for request_id, one in zip(ids, drafted, strict=True):
            self._drafts[request_id].candidates.append(one)
        if len(rows) == len(requests):
            return scores
        result = logits.copy()
        result[rows] = scores
        return result

    def remember(self, requests: Sequence[Request], hidden: NDArray[np.float32]) -> None:
        """Keep the states [B, d] from which the next draft token of each row is chosen; for the semantic index."""
        for request, row in zip(requests, hidden, strict=True):
            if request.request_id in self._sessions:
                self._drafts[request.request_id].hidden.append(row)

    def of_chains(self, requests: Sequence[Request]) -> ChainPrior | None:
        """What chains of drafts that run in one call need of the priors; None: nothing. ``slabs`` came before."""
        sessions = [self._sessions.get(request.request_id) for request in requests]
        if self._prior is None or not any(sessions):
            return None
        contexts = [last_two(request) for request in requests]
        return self._prior.of_chains(sessions, contexts, _are_greedy(requests))

    def take_chains(
        self,
        requests: Sequence[Request],
        lengths: Sequence[int],
        candidates: Candidates | None,
        hidden: NDArray[np.float32] | None,
    ) -> None:
        """Keep what such chains were chosen from, as ``with_prior`` and ``remember`` do.

        Args:
            requests: one a row.
            lengths: of the chains.
            candidates: of step s and request b in row s * B + b; None without a prior.
            hidden: [S, B, d], where ``wants_hidden``.
        """
        rows, size = [] if candidates is None else drafted_rows(candidates), len(requests)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            if request.request_id in self._sessions:
                drafts = self._drafts[request.request_id]
                drafts.candidates += rows[row : row + length * size : size]
                drafts.hidden += [] if hidden is None else list(hidden[:length, row])

    def learn(self, sequences: Sequence[VerifiedSequence]) -> None:
        """From all positions that were drafted and reached."""
        if self._prior is None:
            return
        sessions, drafted, targets = [], [], []
        for sequence in sequences:
            if sequence.num_drafts and (drafts := self._drafts.get(sequence.request.request_id)):
                reached = sequence.token_ids[: sequence.num_drafts]
                for one, token_id in zip(drafts.candidates, reached, strict=False):
                    sessions.append(self._sessions[sequence.request.request_id])
                    drafted.append(one)
                    targets.append(token_id)
        self._prior.learn(sessions, drafted, targets)


def _are_greedy(requests: Sequence[Request]) -> list[bool]:
    return [warmth(request.sampling) == 0.0 for request in requests]
