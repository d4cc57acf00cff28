"""Priors on what the draft tokens of a step are chosen from, and the states they are chosen from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.draft_vocab.running_texts import RunningTexts
from engine.request import Request
from kernels.native_sessions import LogitsOf, Sessions
from kernels.session_library import DraftStep


class DraftedTokens:
    """The draft tokens of a step, one for each row at a time.

    Args:
        sessions: whose priors they have.
        texts: of the running sequences.
        wants_hidden: whether somebody asks for ``DraftState.hidden``.
    """

    def __init__(self, sessions: Sessions, texts: RunningTexts, *, wants_hidden: bool) -> None:
        self._sessions, self._texts, self.wants_hidden = sessions, texts, wants_hidden
        self._step = DraftStep((), ())

    def choose_with_prior(
        self, requests: Sequence[Request], token_ids: torch.Tensor, logits: torch.Tensor, logits_of: LogitsOf
    ) -> list[int]:
        """Add each session's prior to the candidates' logits, in place: the token of each row with the largest sum.

        Tokens that followed a repeat of the text's end become candidates, whatever the draft thinks of them.

        Args:
            requests: one a row; drafts before this one are in their ``draft_token_ids``, as many in each. Those of a
                step's later tokens are among those of its first, in the same order.
            token_ids: [B, C] int32 on the CPU, -1 for none; the weakest make room, in place.
            logits: [B, C] float32 on the CPU, -inf for none.
            logits_of: for the tokens that become candidates; where it is NaN, that of the one that made room stays.
        """
        drafts = [request.draft_token_ids for request in requests]
        if not drafts[0] or len(self._step) != len(drafts):
            states = [request.draft_state for request in requests]
            sessions, texts = [state.session for state in states], [state.text for state in states]
            if sessions != self._step.sessions or texts != self._step.texts:  # seldom: made anew for other rows only
                self._step = DraftStep(sessions, texts)
        self._step.go_on(drafts, token_ids, logits)
        self._sessions.score(self._texts.texts, self._step, logits_of)
        return self._step.best

    def remember(self, requests: Sequence[Request], hidden: NDArray[np.float32]) -> None:
        """Keep the states [B, d] from which the next draft token of each row is chosen."""
        for request, row in zip(requests, hidden, strict=True):
            request.draft_state.hidden.append(row)
