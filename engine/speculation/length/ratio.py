"""How drafts fare against an average."""

from __future__ import annotations

from dataclasses import dataclass

_SEQUENCE_PRIOR = 2.0


@dataclass(slots=True)
class Ratio:
    """How the drafts of a sequence, or at repeats of a level, fare against the average of the tenant's.

    The ratio is accepted / expected, with fading memory.
    """

    accepted: float = 0.0
    expected: float = 0.0

    @property
    def value(self) -> float:
        return (self.accepted + _SEQUENCE_PRIOR) / (self.expected + _SEQUENCE_PRIOR)

    def fade(self, memory: float) -> None:
        self.accepted *= memory
        self.expected *= memory
