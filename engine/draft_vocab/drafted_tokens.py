"""What the draft tokens of a step are chosen from, with which prior, until verification has judged them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.draft_state import NONE
from engine.request import Request
from kernels.native_sessions import Sessions
from kernels.session_library import DraftStep
from kernels.session_options import NUM_FEATURES, Drafted

if TYPE_CHECKING:
    from engine.speculation.drafters.lookup import RunningTexts

LogitsOf = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray[np.float32]]
"""The draft's logits [n] of any tokens [n], at some rows [n]."""


class DraftedTokens:
    """Adds priors to candidates, and remembers what was drafted from them in a step.

    Args:
        sessions: whose priors they are.
        texts: of the running sequences.
        wants_hidden: whether somebody asks for ``hidden``.
    """

    def __init__(self, sessions: Sessions, texts: RunningTexts, *, wants_hidden: bool) -> None:
        self._sessions, self._texts, self.wants_hidden = sessions, texts, wants_hidden
        self.begin()

    def begin(self) -> None:
        """A step's drafts begin; what was remembered of the last ones is dropped."""
        self._steps: list[Drafted] = []
        self._num_rows = 0

    def arrays(self) -> Drafted | None:
        """What the step's draft tokens were chosen from; None where nothing was drafted with a prior."""
        if len(self._steps) <= 1:
            return self._steps[0] if self._steps else None
        token_ids, logits, features = (
            np.concatenate(parts)
            for parts in zip(*((one.token_ids, one.logits, one.features) for one in self._steps), strict=True)
        )
        return Drafted(token_ids, logits, features)

    def with_prior(
        self,
        requests: Sequence[Request],
        token_ids: NDArray[np.int32],
        logits: NDArray[np.float32],
        logits_of: LogitsOf,
    ) -> NDArray[np.float32]:
        """The candidates' logits with each session's prior: [B, C].

        Tokens that followed a repeat of the text's end become candidates, whatever the draft thinks of them.

        Args:
            requests: one a row; drafts before this one are in their ``draft_token_ids``, as many in each.
            token_ids: [B, C], -1 for none; the weakest make room, in place.
            logits: [B, C], -inf for none; likewise.
            logits_of: for the tokens that become candidates.
        """
        sessions = [request.draft_state.session for request in requests]
        if max(sessions) == NONE:
            return logits
        texts = [request.draft_state.text for request in requests]
        step = DraftStep(sessions, texts, [request.draft_token_ids for request in requests])
        included = self._sessions.include_repeats(self._texts.texts, step, token_ids)
        if len(included):
            rows, columns = included.T
            logits[rows, columns] = logits_of(rows, token_ids[rows, columns])
        drafted = Drafted(token_ids, logits, np.empty((len(token_ids), NUM_FEATURES, token_ids.shape[1]), np.float32))
        scores = self._sessions.score(step, drafted)
        for row, request in enumerate(requests, start=self._num_rows):
            request.draft_state.candidates.append(row)
        self._steps.append(drafted)
        self._num_rows += len(requests)
        return scores

    def remember(self, requests: Sequence[Request], hidden: NDArray[np.float32]) -> None:
        """Keep the states [B, d] from which the next draft token of each row is chosen."""
        for request, row in zip(requests, hidden, strict=True):
            request.draft_state.hidden.append(row)

    def take_chains(
        self,
        requests: Sequence[Request],
        lengths: Sequence[int],
        drafted: Drafted | None,
        hidden: NDArray[np.float32] | None,
    ) -> None:
        """Keep what whole chains of drafts were chosen from.

        Args:
            requests: B, one a row.
            lengths: of the chains.
            drafted: of step s and request b in row s * B + b; None without a prior.
            hidden: [S, B, d], where ``wants_hidden``.
        """
        size = len(requests)
        if drafted is not None:
            self._steps = [drafted]
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            if drafted is not None:
                request.draft_state.candidates = list(range(row, row + length * size, size))
            if hidden is not None:
                request.draft_state.hidden = list(hidden[:length, row])
