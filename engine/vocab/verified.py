"""What a verified step tells the draft vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.request import Request

RowsTopK = Callable[[int, int], NDArray[np.int32]]
"""The target's most likely tokens at rows start .. end - 1 of a step's logits: [end - start, k], best first."""


@dataclass(frozen=True, slots=True)
class VerifiedSequence:
    """A sequence's part of a step, before the commit.

    ``token_ids``, kept of the target's choices, come from the rows of the logits from ``first_row`` on;
    ``num_drafts`` tokens had been drafted.
    """

    request: Request
    token_ids: Sequence[int]
    num_drafts: int
    first_row: int

    @property
    def num_accepted(self) -> int:
        """How many of the kept tokens were drafted."""
        pairs = list(zip(self.request.draft_token_ids[: self.num_drafts], self.token_ids, strict=False))
        return next((place for place, (draft, token_id) in enumerate(pairs) if draft != token_id), len(pairs))
