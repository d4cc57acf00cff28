"""Drafts that cost nothing: what followed the longest repeat of a sequence's end in its own prompt and answer.

Prompt lookup decoding (Saxena 2023): for the sequences and steps in which it promises more than the draft does, or as a
method of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from evospec.engine.draft_state import NONE
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import DraftCosts, Proposer
from evospec.engine.speculation.length.policy import Copy
from evospec.engine.step_plan import DraftSlot
from evospec.engine.verification import Verification
from evospec.kernels.native_chain import CONFIDENCE_LEVELS, StopRule

MIN_MATCH = 3
"""Fewest tokens at the text's end that must have come before."""


class PromptLookup:
    """Finds what the ends of running sequences repeat."""

    def __init__(self, texts: RunningTexts) -> None:
        self._texts = texts

    def look(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Copy | None]:
        """For the sequences whose last ``MIN_MATCH`` tokens came before: what followed the longest repeat."""
        rows = [row for row, limit in enumerate(limits) if limit > 0]
        self._texts.read(requests[row] for row in rows)
        rows = [row for row in rows if requests[row].draft_state.text != NONE]
        copies: list[Copy | None] = [None] * len(requests)
        if not rows:
            return copies
        tokens, lengths = self._texts.texts.copy([requests[row].draft_state.text for row in rows], max(limits))
        for row, copied, length in zip(rows, tokens, lengths, strict=True):
            if length >= MIN_MATCH:
                levels = [min(length + number, CONFIDENCE_LEVELS) - 1 for number in range(limits[row])]
                copies[row] = Copy(copied[: limits[row]], levels)
        return copies

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._texts.forget(request)


def are_predicted(one: Verification) -> list[bool]:
    """Of a committed step's accepted tokens: whether they were copied, and the prediction goes on with them, too.

    A prompt often has the same words as the prediction, so it does not matter from which of them they were copied.
    """
    predicted = one.request.draft_state.predicted
    if not predicted or one.source != "lookup":
        return [False] * one.num_accepted
    start = one.request.num_tokens - len(one.kept) - MIN_MATCH
    tokens = "".join(map(chr, one.request.all_token_ids[start:]))
    return [tokens[at : at + MIN_MATCH + 1] in predicted for at in range(one.num_accepted)]


MAX_TEXTS = 512
"""Sequences in which repeats are looked for at the same time."""


class NgramProposer(Proposer):
    """Copies from a sequence's own prompt and answer, after the longest repeat of its last tokens.

    A sequence whose end is new gets no draft. A text that repeats itself is drafted on beyond its end.
    """

    source = "lookup"

    def __init__(self, texts: RunningTexts) -> None:
        self._lookup = PromptLookup(texts)

    def propose(self, slots: Sequence[DraftSlot], stop: StopRule | None = None) -> None:
        """Draft where something repeats; text that was not looked at yet is indexed first.

        With ``stop``, as many tokens as are best on average: nobody knows how sure a copy is.
        """
        requests, limits = [slot.request for slot in slots], [slot.num_tokens for slot in slots]
        if stop is not None:
            limits = [min(one.draft_state.draftable.planned, most) for one, most in zip(requests, limits, strict=True)]
        for request, copy in zip(requests, self._lookup.look(requests, limits), strict=True):
            if copy is not None:
                request.draft_token_ids += copy.token_ids

    def forget(self, request: Request) -> None:
        self._lookup.forget(request)


class NgramDraft:
    """Method ``ngram``: nothing to load, for any model."""

    description = "ngram"
    costs = DraftCosts(0, 0)
    vocab: DraftVocab | None = None

    def make_proposer(self, num_blocks: int) -> Proposer:
        return NgramProposer(RunningTexts(MAX_TEXTS))
