"""Priors on what the draft tokens of a step are chosen from, and the states they are chosen from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.request import Request
from kernels.native_sessions import Sessions
from kernels.session_library import DraftStep

if TYPE_CHECKING:
    from engine.speculation.drafters.lookup import RunningTexts

LogitsOf = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray[np.float32]]
"""The draft's logits [n] of any tokens [n], at some rows [n]."""


class DraftedTokens:
    """The draft tokens of a step, one for each row at a time.

    Args:
        sessions: whose priors they have.
        texts: of the running sequences.
        wants_hidden: whether somebody asks for ``DraftState.hidden``.
    """

    def __init__(self, sessions: Sessions, texts: RunningTexts, *, wants_hidden: bool) -> None:
        self._sessions, self._texts, self.wants_hidden = sessions, texts, wants_hidden
        self._step: DraftStep | None = None

    def begin(self) -> None:
        """A step's drafts begin; what the last ones were chosen from is forgotten."""
        self._sessions.begin_drafts()
        self._step = None

    def with_prior(
        self,
        requests: Sequence[Request],
        token_ids: NDArray[np.int32],
        logits: NDArray[np.float32],
        logits_of: LogitsOf,
    ) -> tuple[NDArray[np.float32], list[int]]:
        """The candidates' logits with each session's prior [B, C], and the token of each row that has the largest.

        Tokens that followed a repeat of the text's end become candidates, whatever the draft thinks of them.

        Args:
            requests: one a row; drafts before this one are in their ``draft_token_ids``, as many in each. Those of a
                step's later tokens are among those of its first, in the same order.
            token_ids: [B, C], -1 for none; the weakest make room, in place.
            logits: [B, C], -inf for none; likewise.
            logits_of: for the tokens that become candidates; where it is NaN, that of the one that made room stays.
        """
        step = self._step
        if step is None or len(step) != len(requests):
            states = [request.draft_state for request in requests]
            step = DraftStep([state.session for state in states], [state.text for state in states])
            self._step = step
        step.go_on([request.draft_token_ids for request in requests])
        included = self._sessions.include_repeats(self._texts.texts, step, token_ids)
        if len(included):
            rows, columns = included.T
            new, replaced = logits_of(rows, token_ids[rows, columns]), logits[rows, columns]
            logits[rows, columns] = np.where(np.isnan(new), replaced, new)
        return self._sessions.score(step, token_ids, logits), step.best

    def remember(self, requests: Sequence[Request], hidden: NDArray[np.float32]) -> None:
        """Keep the states [B, d] from which the next draft token of each row is chosen."""
        for request, row in zip(requests, hidden, strict=True):
            request.draft_state.hidden.append(row)
