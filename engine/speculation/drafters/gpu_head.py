"""From a draft's hidden states to draft tokens on a GPU: launched, and never waited for.

NOT RUN on a GPU so far (docs/decisions/006-cuda-graphs.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.draft_vocab.running_texts import NONE
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.request import Request
from evospec.kernels.choose_tokens import GpuRows
from evospec.kernels.draft_head import draft_head_topk
from evospec.kernels.head_rows import Core, HeadRows, TailSlabs
from evospec.kernels.session_memory import DraftedRounds
from evospec.kernels.session_prior import GpuPrior


class GpuHead:
    """Chooses as the ``DraftHead`` does that it is of.

    Args:
        core: with its rows.
        tails: of sequences; None: there are none.
        rows: of the whole head.
        vocab: whose tails they are, and whose priors count; None: there is nothing of the kind.
        candidates: tokens of each row that are chosen among.
    """

    def __init__(
        self, core: Core, tails: TailSlabs | None, rows: HeadRows, vocab: DraftVocab | None, candidates: int
    ) -> None:
        assert core.rows is not None
        self._core, self._tails, self._vocab = core, tails, vocab
        self._count = min(candidates, len(core.rows) + (0 if tails is None else tails.slots))
        self._prior: GpuPrior | None = None
        if vocab is not None and vocab.uses_prior:
            self._prior = GpuPrior(vocab.sessions, vocab.texts.texts, rows)

    @property
    def num_kept(self) -> int:
        """Candidates of each draft token that the host is told."""
        return 0 if self._prior is None else self._count

    def begin(self, requests: Sequence[Request], size: int) -> NDArray[np.int32]:
        """[3, size]: tail, session and text of the requests that are drafted for next; further rows have none."""
        rows = np.full((3, size), NONE, np.int32)
        if self._vocab is not None:
            self._vocab.before_drafts(requests)
            sessions, texts = self._vocab.slots(requests), self._vocab.texts.slots(requests)
            texts = [NONE if session == NONE else text for session, text in zip(sessions, texts, strict=True)]
            rows[0] = self._vocab.num_total
            rows[:, : len(requests)] = self._vocab.slabs(requests), sessions, texts
        return rows

    def choose(
        self, hidden: torch.Tensor, rows: torch.Tensor, how: GpuRows | None, drafted: DraftedRounds, place: int
    ) -> None:
        """The tokens of a place in chains.

        Args:
            hidden: [N, hidden].
            rows: [3, N] int32, what ``begin`` said.
            how: tokens are chosen; None: all greedy.
            drafted: where they go, and those of the places before are.
            place: from 0 on.
        """
        count = 1 if how is None and self._prior is None else self._count
        tails = None if self._tails is None else rows[0]
        scores, token_ids = draft_head_topk(hidden, self._core, count, self._tails, tails)
        best = token_ids[:, 0]
        if self._prior is not None:
            scores, best = self._prior.score((scores, token_ids), hidden, rows[1:], drafted, place)
            token_ids = drafted.token_ids(place)
        if how is not None:
            least, _ = how.thresholds(scores)  # the candidates are few: all are looked at
            best = how.choose(scores, token_ids, least)
        drafted.chosen(place).copy_(best.clamp(min=0))

    def learn_from(self, requests: Sequence[Request], lengths: Sequence[int], block: torch.Tensor) -> None:
        """Tell priors what the chains were chosen from: ``DraftedRounds.block``, on the host."""
        if self._prior is not None and self._vocab is not None:
            self._vocab.sessions.take_drafts(block, self._count, self._vocab.slots(requests), lengths)
