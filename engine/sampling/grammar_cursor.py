"""Where one sequence's output stands in its grammar, as the engine's step sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from evospec.engine.sampling.grammar_messages import Failure

Masks = NDArray[np.int32]

GRAMMAR_SPENT = "The schema takes too long to enforce: it is too ambiguous for the model's tokens."
GRAMMAR_CONTRADICTS = "The schema allows no further token: what it asks for cannot be written with the model's tokens."
GRAMMAR_FAILED = "The schema cannot be enforced any more: what does so has failed."


class GrammarCursor(ABC):
    """``commit`` says how the output has grown, ``ask`` asks for the masks that follow it and some drafts."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        """[MASKS_PER_SLOT, words] int32, a bit a token: after the output, and after each draft."""
        self.num_masks = 0
        """How many of them are right."""
        self.drafts: list[int] = []
        """The tokens that were asked about last: the masks but the first are about these."""
        self._committed: list[int] | None = []
        """What the output has got since it was last asked about; None: nothing, that was asked."""
        self.failure: str | None = None
        """Why the sequence has to end, in words fit for the client."""
        self.is_slow = False
        """Whether its latest mask took so long that the next one is likely to come after the step that needs it."""

    @property
    def is_known(self) -> bool:
        """Whether the mask that follows the output is there, or will never be."""
        return self.num_masks > 0 or self.failure is not None

    @property
    def is_answered(self) -> bool:
        """Whether all masks are there that were asked for, or will never be."""
        return self.is_known

    def num_masks_for(self, draft_token_ids: Sequence[int]) -> int:
        """How many masks are right for a sequence that has these drafts."""
        if self.failure is not None:
            return 0
        pairs = zip(self.drafts, draft_token_ids, strict=False)
        num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return min(self.num_masks, 1 + num_same)

    def commit(self, token_ids: list[int]) -> None:
        """The output has got these tokens, since it was last asked about."""
        self.num_masks, self._committed, self.drafts = 0, token_ids, []

    @abstractmethod
    def ask(self, draft_token_ids: list[int]) -> None:
        """What may follow the output, if that is not known yet, and each of these tokens, one after the other?"""

    def allowed(self, draft_token_ids: list[int]) -> list[int]:
        """Those of the tokens, from the first on, that may follow the output, as far as that can be said at once."""
        return draft_token_ids

    def give_up(self, now: float) -> None:  # noqa: B027 (nothing is awaited where the step computes masks itself)
        """Fail if its mask is awaited for too long; ``now`` by ``time.monotonic``."""

    @abstractmethod
    def end(self) -> None:
        """The sequence is over; nothing of the cursor is to be used again."""

    def _settle(self, num_masks: int, failure: Failure) -> None:
        """The masks are there."""
        self.num_masks = num_masks
        if failure == "spent":
            self.failure = GRAMMAR_SPENT
        elif failure or not self.masks[0].any():
            self.failure = GRAMMAR_CONTRADICTS
