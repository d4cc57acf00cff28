"""The prior of sessions on draft tokens that a GPU chooses (kernels/csrc/sessions/prior.cpp is the specification).

NOT RUN on a GPU so far.
"""

from __future__ import annotations

import torch

from evospec.kernels.head_rows import HeadRows
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_memory import DraftedRounds, SessionMemory, TextMemory


class GpuPrior:
    """Chooses among a draft's candidates, a round of all rows at a time, without waiting for it.

    Args:
        sessions: whose priors they have.
        texts: of the rows.
        head: the draft's, on the GPU, for tokens that repeats make candidates.
    """

    def __init__(self, sessions: Sessions, texts: Texts, head: HeadRows) -> None:
        device = head.rows.device
        self._head, self._sessions, self._texts = head, SessionMemory.of(sessions, device), TextMemory.of(texts, device)

    def score(
        self,
        found: tuple[torch.Tensor, torch.Tensor],
        hidden: torch.Tensor,
        of_rows: torch.Tensor,
        drafted: DraftedRounds,
        place: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a round's candidates and features into ``drafted``, where the tokens of those before are.

        Args:
            found: logits [N, C] float32 and token ids [N, C] int32, the best first, without what repeats.
            hidden: [N, hidden], from which they were found.
            of_rows: [2, N] int32, the session and the text of each row; -1 for none.
            drafted: of N rows and C columns.
            place: of the round.

        Returns:
            Scores [N, C] float32 of the candidates, and the token of each row with the largest [N] int32.
        """
        from evospec.kernels.triton.session_prior import add_priors_triton
        from evospec.kernels.triton.text_repeats import include_repeats_triton

        include_repeats_triton(found, hidden, self._head, self._texts, of_rows[1], drafted, place)
        return add_priors_triton(self._sessions, of_rows[0], drafted, place)
