"""What the token log keeps of a request's steps until they are written."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from engine.online.verify_record import VerifyRecord

_STEPS_AT_ONCE = 32
"""To write one step takes about as long as to write so many."""
_MOST_SECONDS = 0.5


@dataclass(slots=True)
class UnwrittenSteps:
    """Steps of a request, one right after the other."""

    began_at: float
    """When (``time.monotonic``) the first of them was made."""
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    """The request's blocks at the last of them: they hold what is stored of its tokens."""
    records: list[VerifyRecord] = field(default_factory=list)
    """One of each step, without context and prior, and without a place in the feature ring."""

    @property
    def start(self) -> int:
        """Position of their first token."""
        return self.records[0].position - 1

    @property
    def token_ids(self) -> list[int]:
        """Of each step the last known token and the accepted drafts."""
        return [token for one in self.records for token in (one.last_token, *one.drafted[: one.num_accepted])]

    def add(self, record: VerifyRecord, block_ids: array[int]) -> None:
        """Another step, and the request's blocks then, which are copied."""
        self.records.append(record)
        self.block_ids = block_ids[:]

    def are_enough(self, now: float) -> bool:
        """Whether they are to be written now: they are many, or wait for long."""
        return len(self.records) >= _STEPS_AT_ONCE or now - self.began_at >= _MOST_SECONDS

    @property
    def next_position(self) -> int:
        """Where a step would be that comes right after them."""
        last = self.records[-1]
        return last.position + last.num_accepted + 1
