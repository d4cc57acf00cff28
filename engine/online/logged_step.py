"""What the token log reads of a verify step of one sequence, and what it keeps of steps until they are written."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.online.verify_record import VerifyRecord
from engine.verification import Verification

_STEPS_AT_ONCE = 32
"""To write one step takes about as long as to write so many."""
_MOST_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """A step of a sequence, and whether the first token that was drafted is right (None: none, or it was copied)."""

    verified: Verification
    first_right: bool | None

    @property
    def kept(self) -> Sequence[int]:
        return self.verified.kept

    @property
    def num_accepted(self) -> int:
        return len(self.kept) - 1

    @property
    def drafted(self) -> list[int]:
        """The draft tokens; where the output stops at a right one, those before it: the rest was not looked at."""
        drafted = self.verified.sequence.draft_token_ids
        return drafted[: self.num_accepted] if self.verified.num_accepted > self.num_accepted else drafted

    @property
    def is_last(self) -> bool:
        """Whether the output ends with it."""
        truncation = self.verified.truncation
        return truncation is not None and truncation.finish_reason is not None

    @property
    def last_token(self) -> int:
        """The last known token."""
        return self.verified.sequence.token_ids[self.verified.sequence.num_known - 1]

    @property
    def position(self) -> int:
        """Of the token after the last known one."""
        return self.verified.sequence.start + self.verified.sequence.num_known


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

    def goes_on_with(self, step: LoggedStep) -> bool:
        """Whether no position lies between them and a step."""
        last = self.records[-1]
        return last.position + last.num_accepted + 1 == step.position
