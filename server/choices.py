"""One sequence of a request: its text as it grows, and what it counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evospec.engine.messages import EngineOutput
from evospec.engine.text.detokenizer import IncrementalDetokenizer, StopStringBuffer
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.schemas.answers import SpeculativeDecoding


class ChoiceText:
    """Text of one sequence, piece by piece: never half a character, never a part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer.token_bytes)
        self._stop = StopStringBuffer(stop)
        self._length = 0

    def push(self, output: EngineOutput) -> str:
        """The text this output adds for sure."""
        text = self._stop.push(self._detokenizer.push(output.token_ids))
        if output.finish_reason:
            text += self._stop.push(self._detokenizer.finish()) + self._stop.finish()
        if output.text_length is not None:
            text = text[: output.text_length - self._length]
        self._length += len(text)
        return text


@dataclass
class Choice:
    """One sequence: its text so far, its counts, and when its first and last output came (``time.monotonic`` seconds).

    ``steps_by_accepted``: entry ``j`` counts the steps that accepted exactly ``j`` draft tokens.
    """

    index: int
    text: ChoiceText
    steps_by_accepted: list[int]
    num_draft_tokens: int = 0
    draft_version: int = 0
    num_tokens: int = 0
    num_predicted_tokens: int = 0
    num_cached_tokens: int = 0
    first_output: float = 0.0
    last_output: float | None = None

    def count_drafts(self, output: EngineOutput) -> None:
        """Count a step that verified drafts."""
        if not output.copied:
            self.draft_version = output.draft_version
        self.num_draft_tokens += output.num_draft_tokens
        self.num_predicted_tokens += output.num_predicted_tokens
        self.steps_by_accepted += [0] * (output.num_accepted_tokens + 1 - len(self.steps_by_accepted))
        self.steps_by_accepted[output.num_accepted_tokens] += 1

    def speculative_decoding(self) -> SpeculativeDecoding:
        """How its drafts fared so far, for the client."""
        steps = sum(self.steps_by_accepted)
        accepted = sum(length * count for length, count in enumerate(self.steps_by_accepted))
        return SpeculativeDecoding(
            mean_acceptance_length=1 + accepted / max(1, steps),
            draft_acceptance_rate=accepted / max(1, self.num_draft_tokens),
            acceptance_histogram=list(self.steps_by_accepted),
            num_spec_steps=steps,
            num_accepted_draft_tokens=accepted,
            num_draft_tokens=self.num_draft_tokens,
            num_spec_tokens=len(self.steps_by_accepted) - 1,
            draft_version=self.draft_version,
        )
