"""Drafts that cost nothing: what followed the longest repeat of a sequence's end in its own prompt and answer.

Prompt lookup decoding (Saxena 2023): for the sequences and steps in which it promises more than the draft does, or as a
method of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from evospec.engine.draft_vocab.running_texts import NONE, RunningTexts
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import DraftCosts, Proposer
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import Copy, DraftSlot, Proposal, Proposals
from evospec.kernels.native_chain import CONFIDENCE_LEVELS

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
        slots = dict(zip(rows, self._texts.slots(requests[row] for row in rows), strict=True))
        rows = [row for row, slot in slots.items() if slot != NONE]
        copies: list[Copy | None] = [None] * len(requests)
        if not rows:
            return copies
        tokens, lengths = self._texts.texts.copy([slots[row] for row in rows], max(limits))
        for row, copied, length in zip(rows, tokens, lengths, strict=True):
            if length >= MIN_MATCH:
                levels = [min(length + number, CONFIDENCE_LEVELS) - 1 for number in range(limits[row])]
                token_ids = copied[: limits[row]]
                copies[row] = Copy(token_ids, levels, self._are_predicted(requests[row], token_ids))
        return copies

    def _are_predicted(self, request: Request, token_ids: Sequence[int]) -> list[bool]:
        """Of each token that may be copied, whether the client's prediction goes on with it, too.

        A prompt often has the same words as the prediction, so it does not matter from which of them it is copied.
        """
        predicted = self._texts.predicted(request)
        if not predicted:
            return []
        text = "".join(map(chr, [*request.all_token_ids[-MIN_MATCH:], *token_ids]))
        return [text[at : at + MIN_MATCH + 1] in predicted for at in range(len(token_ids))]


MAX_TEXTS = 512
"""Sequences in which repeats are looked for at the same time."""


class NgramProposer(Proposer):
    """Copies from a sequence's own prompt and answer, after the longest repeat of its last tokens.

    A sequence whose end is new gets no draft. A text that repeats itself is drafted on beyond its end.
    """

    def __init__(self, texts: RunningTexts) -> None:
        self._texts, self._lookup = texts, PromptLookup(texts)

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        """Draft where something repeats; text that was not looked at yet is indexed first."""
        requests = [slot.request for slot in slots]
        copies = zip(requests, self._lookup.look(requests, [slot.num_tokens for slot in slots]), strict=True)
        return {
            request: Proposal(copy.token_ids, "lookup", predicted=copy.predicted)
            for request, copy in copies
            if copy is not None
        }

    def end(self, request: Request) -> None:
        self._texts.end(request)


class NgramDraft:
    """Method ``ngram``: nothing to load, for any model."""

    description = "ngram"
    costs = DraftCosts(0, 0)
    vocab: DraftVocab | None = None

    def make_proposer(self, num_blocks: int) -> Proposer:
        return NgramProposer(RunningTexts(MAX_TEXTS))
