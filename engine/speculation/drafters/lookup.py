"""Drafts that cost nothing: what followed the longest repeat of a sequence's end in its own prompt and answer.

Prompt lookup decoding (Saxena 2023): for the sequences and steps in which it promises more than the draft does, as a
method of its own, or in turn with an EAGLE-3 draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.batch import Features
from engine.draft_vocab.running_texts import RunningTexts
from engine.draft_vocab.vocab import DraftVocab
from engine.request import Request
from engine.speculation.drafters.base import DraftCosts, Proposer
from engine.speculation.drafters.eagle import EagleDraft, EagleProposer
from engine.speculation.length.policy import Confidence, Repeat, StopRule
from engine.step_plan import DraftSlot, ScheduledSequence
from kernels.native_chain import CONFIDENCE_LEVELS

MIN_MATCH = 3
"""Fewest tokens at the text's end that must have come before."""


class Copy(msgspec.Struct, frozen=True):
    """Tokens that may come next. The more agreed before one, the surer it is."""

    token_ids: list[int]
    repeat: Repeat


class PromptLookup:
    """Finds what the ends of running sequences repeat.

    Args:
        texts: of the sequences.
    """

    def __init__(self, texts: RunningTexts) -> None:
        self._texts = texts

    def look(self, requests: Sequence[Request], limits: Sequence[int]) -> dict[str, Copy]:
        """For the sequences whose last ``MIN_MATCH`` tokens came before: what followed the longest repeat."""
        wanted = [(request, limit) for request, limit in zip(requests, limits, strict=True) if limit > 0]
        self._texts.read(request for request, _ in wanted)
        slots = self._texts.slots([request for request, _ in wanted])
        rows = [(slot, *one) for slot, one in zip(slots, wanted, strict=True) if slot >= 0]
        if not rows:
            return {}
        tokens, lengths = self._texts.texts.copy([slot for slot, *_ in rows], max(limits))
        copies = {}
        for (_, request, limit), copied, length in zip(rows, tokens, lengths, strict=True):
            if length >= MIN_MATCH:
                levels = [min(length + number, CONFIDENCE_LEVELS) - 1 for number in range(limit)]
                repeat = Repeat(levels, request.sampling.temperature == 0.0)
                copies[request.request_id] = Copy(copied[:limit], repeat)
        return copies

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._texts.forget(request_id)


_MAX_TEXTS = 512
"""Sequences in which repeats are looked for at the same time."""


class NgramProposer:
    """Copies from a sequence's own prompt and answer, after the longest repeat of its last tokens.

    A sequence whose end is new gets no draft. A text that repeats itself is drafted on beyond its end.
    """

    capture_layers: tuple[int, ...] = ()
    stops_early = False

    def __init__(self) -> None:
        self._lookup = PromptLookup(RunningTexts(_MAX_TEXTS))

    def propose(self, slots: Sequence[DraftSlot], stop: StopRule | None = None) -> Confidence:
        """Draft where something repeats; text that was not looked at yet is indexed first.

        With ``stop``, as many tokens as are best on average: nobody knows how sure a copy is.
        """
        requests, limits = [slot.request for slot in slots], [slot.num_tokens for slot in slots]
        if stop is not None:
            limits = [min(stop.planned[one.request_id], most) for one, most in zip(requests, limits, strict=True)]
        copies = self._lookup.look(requests, limits)
        for request in requests:
            if request.request_id in copies:
                request.draft_token_ids += copies[request.request_id].token_ids
        return {}

    def num_unread(self, request: Request) -> int:
        """None: to look for a repeat costs next to nothing."""
        return 0

    def after_verification(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: Features | None
    ) -> None:
        """Nothing: the committed tokens are in the requests."""

    def forget(self, request_id: str) -> None:
        """Drop a request's index."""
        self._lookup.forget(request_id)


class NgramDraft:
    """Method ``ngram``: nothing to load, for any model."""

    description = "ngram"
    costs = DraftCosts(0, 0)
    vocab: DraftVocab | None = None

    def make_proposer(self, num_blocks: int) -> Proposer:
        """Needs no memory of the device."""
        return NgramProposer()


class SwitchingProposer:
    """Per sequence and step either n-grams or the EAGLE-3 draft, as vLLM's pull request 24344 does.

    Args:
        otherwise: drafts for the sequences in which nothing repeats; it sees all steps.
    """

    def __init__(self, otherwise: EagleProposer) -> None:
        self.otherwise, self._ngrams = otherwise, NgramProposer()
        self.capture_layers, self.stops_early = otherwise.capture_layers, otherwise.stops_early

    def propose(self, slots: Sequence[DraftSlot], stop: StopRule | None = None) -> Confidence:
        """N-grams where there is a match, the EAGLE-3 draft for the rest."""
        self._ngrams.propose(slots, stop)
        return self.otherwise.propose([slot for slot in slots if not slot.request.draft_token_ids], stop)

    def num_unread(self, request: Request) -> int:
        """Those of the EAGLE-3 draft."""
        return self.otherwise.num_unread(request)

    def after_verification(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: Features | None
    ) -> None:
        """Arguments as ``Proposer.after_verification``."""
        self.otherwise.after_verification(sequences, num_kept, features)

    def forget(self, request_id: str) -> None:
        """A request has ended or was preempted."""
        self._ngrams.forget(request_id)
        self.otherwise.forget(request_id)


class SwitchingDraft:
    """Method ``ngram_eagle3``.

    Args:
        eagle: what drafts where nothing repeats.
    """

    def __init__(self, eagle: EagleDraft) -> None:
        self._eagle = eagle
        self.description = f"ngram, else {eagle.description}"
        self.costs, self.vocab = eagle.costs, eagle.vocab

    def make_proposer(self, num_blocks: int) -> Proposer:
        """Allocate what the EAGLE-3 draft needs for blocks 0 .. num_blocks - 1."""
        return SwitchingProposer(self._eagle.make_proposer(num_blocks))
