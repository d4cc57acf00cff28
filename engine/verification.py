"""What one step has decided about one sequence: built once, read by all that learns, logs, counts or emits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from evospec.engine.draft_state import DraftSource
from evospec.engine.request import Request
from evospec.engine.step_plan import ScheduledSequence
from evospec.engine.truncation import Truncation

if TYPE_CHECKING:
    from evospec.engine.sampling.sampler import SampledSequence


class Verification(msgspec.Struct, frozen=True):
    """A sequence's part of a verified step, before the commit."""

    sequence: ScheduledSequence
    first_row: int
    """The first of the sequence's rows of logits that tokens are chosen from; the rows of its drafts follow."""
    choice: SampledSequence | None = None
    """The target's choices; None while the prompt is unfinished, or where a grammar's mask is late."""
    truncation: Truncation | None = None
    """Where the output ends among them; None without choices."""
    kept: list[int] = []
    """The tokens that the output gets: accepted drafts, then a recovered or bonus token, as far as it goes on."""
    num_accepted: int = 0
    """How many of them were drafted."""
    source: DraftSource | None = None
    """Who drafted the tokens that were verified; None: nothing was drafted."""

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def rows(self) -> range:
        """The rows of logits from which the kept tokens were chosen."""
        return range(self.first_row, self.first_row + len(self.kept))

    @property
    def num_chosen(self) -> int:
        """The target's choices, also those after the output's end."""
        return 0 if self.choice is None else len(self.choice.token_ids)
