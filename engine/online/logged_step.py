"""What the token log reads of a verify step of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.verification import Verification


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
