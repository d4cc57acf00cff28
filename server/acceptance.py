"""Counts of one sequence's draft tokens."""

from __future__ import annotations

from server.schemas.answers import SpeculativeDecoding


class AcceptanceCounts:
    """Adds up the verification steps of a sequence that has at most ``num_spec_tokens`` drafts a step."""

    def __init__(self, num_spec_tokens: int) -> None:
        self._num_draft_tokens = 0
        self._histogram = [0] * (num_spec_tokens + 1)
        self._draft_version = 0

    def add(self, num_draft_tokens: int, num_accepted_tokens: int, draft_version: int = 0) -> None:
        """Count a step that verified drafts of a version."""
        self._draft_version = draft_version
        self._num_draft_tokens += num_draft_tokens
        self._histogram[num_accepted_tokens] += 1

    def summary(self) -> SpeculativeDecoding:
        """The counts so far, for the client."""
        steps = sum(self._histogram)
        accepted = sum(length * count for length, count in enumerate(self._histogram))
        return SpeculativeDecoding(
            mean_acceptance_length=1 + accepted / max(1, steps),
            draft_acceptance_rate=accepted / max(1, self._num_draft_tokens),
            acceptance_histogram=list(self._histogram),
            num_spec_steps=steps,
            num_accepted_draft_tokens=accepted,
            num_draft_tokens=self._num_draft_tokens,
            num_spec_tokens=len(self._histogram) - 1,
            draft_version=self._draft_version,
        )
