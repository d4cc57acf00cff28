"""What verification made of draft tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Acceptance:
    """Counts by place in the draft, the first place first.

    ``drafted``: drafts that reached the place; ``accepted``: those accepted there and at all places before.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count one draft of one sequence; an empty one does not count."""
        missing = num_drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for place in range(num_drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < num_accepted

    @property
    def num_drafts(self) -> int:
        """Verify steps of sequences that had a draft."""
        return self.drafted[0] if self.drafted else 0

    @property
    def length(self) -> float:
        """Tokens for each verified draft, the recovered or bonus token included; NaN without drafts."""
        return 1 + sum(self.accepted) / self.num_drafts if self.num_drafts else math.nan

    @property
    def rates(self) -> list[float]:
        """At each place: the share of the drafts which reached it that were accepted up to there."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True)]


def total(parts: Iterable[Acceptance]) -> Acceptance:
    """All counts together."""
    result = Acceptance()
    for part in parts:
        missing = len(part.drafted) - len(result.drafted)
        result.drafted += [0] * missing
        result.accepted += [0] * missing
        for place, (drafted, accepted) in enumerate(zip(part.drafted, part.accepted, strict=True)):
            result.drafted[place] += drafted
            result.accepted[place] += accepted
    return result
