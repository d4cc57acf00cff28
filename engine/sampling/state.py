"""What sampling remembers of one request: token counts for penalties.

The state follows the committed tokens (``commit``) and can be moved along a draft and back
(``advance``, ``rewind``), so that each row of a verification sees the history it would have had alone.
"""

from __future__ import annotations

from array import array

from engine.messages import SamplingParams
from kernels.penalties import IntArray


class TokenCounts:
    """How often each token occurs in the output, and which tokens the prompt holds.

    Kept as growing arrays of distinct tokens, so that penalties touch those and never the vocabulary.

    Attributes:
        num_prompt: how many of the tokens, the first, are the prompt's.
        token_ids: distinct tokens.
        counts: of each in the output: 0 for some of the prompt, and for drafts that were taken back.
    """

    def __init__(self, prompt_token_ids: list[int]) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self.num_prompt = len(self._slots)
        self.token_ids: IntArray = array("q", self._slots)
        self.counts: IntArray = array("q", bytes(8 * self.num_prompt))

    def add(self, token_id: int, times: int = 1) -> None:
        """Count ``times`` more occurrences in the output (-1 takes one back)."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self.token_ids):
            self.token_ids.append(token_id)
            self.counts.append(0)
        self.counts[slot] += times


def has_penalties(params: SamplingParams) -> bool:
    """Whether the tokens so far change the logits."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class SamplingState:
    """The history of one request as far as its parameters make sampling depend on it."""

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int]) -> None:
        self.counts: TokenCounts | None = None
        if has_penalties(params):
            self.counts = TokenCounts(prompt_token_ids if params.repetition_penalty != 1.0 else [])
        self.edits_logits = bool(params.grammar or self.counts or params.logit_bias or params.min_tokens)
        self._num_committed = 0

    def commit(self, output_token_ids: list[int]) -> None:
        """Follow the output up to its end; it only ever grows, also across a preemption."""
        for token_id in output_token_ids[self._num_committed :]:
            self.advance(token_id)
        self._num_committed = len(output_token_ids)

    def advance(self, token_id: int) -> None:
        """Add a token to the history."""
        if self.counts is not None:
            self.counts.add(token_id)

    def rewind(self, token_ids: tuple[int, ...]) -> None:
        """Take back the latest tokens that ``advance`` added."""
        if self.counts is not None:
            for token_id in token_ids:
                self.counts.add(token_id, -1)
