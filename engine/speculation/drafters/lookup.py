"""Drafts that cost nothing: what followed the longest repeat of a sequence's end in its own prompt and answer.

Prompt lookup decoding (Saxena 2023): for the sequences and steps in which it promises more than the draft does, or as a
method of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.draft_state import NONE, TEXT_BEFORE
from engine.draft_vocab.vocab import DraftVocab
from engine.request import Request
from engine.speculation.drafters.base import DraftCosts, Proposer
from engine.speculation.length.policy import Copy, Repeat, StopRule
from engine.step_plan import DraftSlot
from engine.verification import Verification
from kernels.native_chain import CONFIDENCE_LEVELS
from kernels.native_texts import Texts
from kernels.session_library import TokenRows

PROMPT_WINDOW = 4096
"""The last tokens of a prompt, which are looked at; fewer where there is a prediction, of which the first count."""
CAPACITY = 8192
"""Tokens of a text; beyond them the older half is forgotten."""


class RunningTexts:
    """Gives each sequence a text, as long as there is room, and keeps it in step with the sequence's tokens.

    An engine has one: a sequence's slot is in its ``DraftState``.

    Args:
        num_slots: most sequences with a text.
    """

    def __init__(self, num_slots: int) -> None:
        self.texts = Texts(num_slots, CAPACITY)
        self._free = list(range(num_slots))[::-1]

    def read(self, requests: Iterable[Request]) -> None:
        """Take the tokens that sequences have got since the last call."""
        rows = TokenRows()
        for request in requests:
            state, token_ids = request.draft_state, request.all_token_ids
            if state.text == NONE and self._free:
                self._begin(request, rows)
            if state.text != NONE and state.num_in_text < len(token_ids):
                rows.add(state.text, token_ids[state.num_in_text :])
                state.num_in_text = len(token_ids)
        if len(rows):
            self.texts.extend(rows)

    def _begin(self, request: Request, rows: TokenRows) -> None:
        """A text begins with what else may be copied: the session's earlier answers, and what is predicted."""
        state = request.draft_state
        state.text = self._free.pop()
        self.texts.clear(state.text)
        predicted = state.prediction[: PROMPT_WINDOW - TEXT_BEFORE]
        state.num_in_text = max(request.num_tokens - PROMPT_WINDOW + len(predicted), 0)
        if said := state.said:
            rows.add(state.text, said)
        if predicted:
            token_ids = [*request.prompt_token_ids[-TEXT_BEFORE:], *predicted]
            rows.add(state.text, token_ids)
            state.predicted = "".join(map(chr, token_ids))

    def take(self, request: Request, count: int) -> int:
        """The slot of the text to which the caller appends the next tokens of a sequence; NONE: ``read`` does that."""
        state = request.draft_state
        if state.text == NONE or state.num_in_text != len(request.all_token_ids):
            return NONE
        state.num_in_text += count
        return state.text

    def forget(self, request: Request) -> None:
        """A request has ended."""
        if request.draft_state.text != NONE:
            self._free.append(request.draft_state.text)
            request.draft_state.text = NONE


MIN_MATCH = 3
"""Fewest tokens at the text's end that must have come before."""


class PromptLookup:
    """Finds what the ends of running sequences repeat.

    Args:
        texts: of the sequences.
    """

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
                repeat = Repeat(levels, requests[row].sampling.temperature == 0.0)
                copies[row] = Copy(copied[: limits[row]], repeat)
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

    Args:
        texts: of the running sequences.
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
        """Drop a request's index."""
        self._lookup.forget(request)


class NgramDraft:
    """Method ``ngram``: nothing to load, for any model."""

    description = "ngram"
    costs = DraftCosts(0, 0)
    vocab: DraftVocab | None = None

    def make_proposer(self, num_blocks: int) -> Proposer:
        """Needs no memory of the device."""
        return NgramProposer(RunningTexts(MAX_TEXTS))
