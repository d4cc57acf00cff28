"""One sequence's place in a compiled grammar, and the masks of what may come next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.sampling.grammar import GrammarMatcher
from engine.sampling.grammar_messages import SECONDS_PER_MASK, SPARE_SECONDS, Failure


class GrammarSequence:
    """Follows an output through its grammar, and counts what that costs.

    Args:
        matcher: at the grammar's start.
        masks: [1 + most drafts, words] int32, a bit a token; ``follow`` writes here.
        clock: seconds of computing so far; called before and after each mask.
    """

    def __init__(self, matcher: GrammarMatcher, masks: NDArray[np.int32], clock: Callable[[], float]) -> None:
        self.failure: Failure = ""
        self.last_seconds = 0.0
        """What the latest mask after the output took."""
        self._matcher, self._masks, self._clock = matcher, masks, clock
        self._spent = 0.0
        self._num_computed = 0

    def follow(self, committed: Sequence[int], drafts: Sequence[int]) -> int:
        """Follow the output by the tokens it has got, and write the masks after it and after each draft.

        Returns how many masks are right: none after a failure, else one and one for each draft that is allowed.
        """
        started = self._clock()
        if committed or not self._num_computed:
            if not all(map(self._matcher.accept, committed)):
                self.failure = "contradiction"
            ended = self._fill(0, started)
            self.last_seconds, started = ended - started, ended
        return 0 if self.failure else 1 + self._look_ahead(drafts, started)

    def _look_ahead(self, drafts: Sequence[int], started: float) -> int:
        """Masks after each draft, up to the first that is not allowed or has nothing after it; returns their number."""
        taken = num_masks = 0
        while taken == num_masks < len(drafts) and self._matcher.accept(drafts[taken]):
            taken += 1
            started = self._fill(taken, started)
            num_masks += not self.failure and bool(self._masks[taken].any())
        if taken:
            self._matcher.rollback(taken)
        return num_masks

    def _fill(self, row: int, started: float) -> float:
        """Write one mask, unless the sequence has failed. ``started``: when its time began; returns when it ended."""
        if not self.failure:
            self._matcher.fill_bitmask(self._masks, row)
        ended = self._clock()
        self._spent += ended - started
        self._num_computed += 1
        if not self.failure and self._spent > SPARE_SECONDS + SECONDS_PER_MASK * self._num_computed:
            self.failure = "spent"
        return ended
