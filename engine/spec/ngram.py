"""Drafting without a draft: what followed the text's end when it last came (prompt lookup decoding, Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from engine.batch import Features
from engine.request import Request
from engine.spec.copies import Copier
from engine.spec.eagle import EagleDraft, EagleProposer
from engine.spec.proposer import DraftCosts, Proposer
from engine.spec.stop_rule import StopRule, Sureness
from engine.step_plan import DraftSlot, ScheduledSequence
from engine.vocab.draft_vocab import DraftVocab
from engine.vocab.running_texts import RunningTexts

_MAX_TEXTS = 512
"""Sequences in which repeats are looked for at the same time."""


class NgramProposer:
    """Copies from a sequence's own prompt and answer, after the longest repeat of its last tokens.

    A sequence whose end is new gets no draft. A text that repeats itself is drafted on beyond its end.
    """

    capture_layers: tuple[int, ...] = ()
    stops_early = False

    def __init__(self) -> None:
        self._copier = Copier(RunningTexts(_MAX_TEXTS))

    def propose(self, slots: Sequence[DraftSlot], stop: StopRule | None = None) -> Sureness:
        """Draft where something repeats; text that was not looked at yet is indexed first.

        With ``stop``, as many tokens as are best on average: nobody knows how sure a copy is.
        """
        requests, limits = [slot.request for slot in slots], [slot.num_tokens for slot in slots]
        if stop is not None:
            limits = [min(stop.planned[one.request_id], most) for one, most in zip(requests, limits, strict=True)]
        copies = self._copier.look(requests, limits)
        for request in requests:
            if request.request_id in copies:
                request.draft_token_ids += copies[request.request_id].token_ids
        return {}

    def num_unread(self, request: Request) -> int:
        """None: to look for a repeat costs next to nothing."""
        return 0

    def observe(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: Features | None
    ) -> None:
        """Nothing: the committed tokens are in the requests."""

    def forget(self, request_id: str) -> None:
        """Drop a request's index."""
        self._copier.forget(request_id)


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

    def propose(self, slots: Sequence[DraftSlot], stop: StopRule | None = None) -> Sureness:
        """N-grams where there is a match, the EAGLE-3 draft for the rest."""
        self._ngrams.propose(slots, stop)
        return self.otherwise.propose([slot for slot in slots if not slot.request.draft_token_ids], stop)

    def num_unread(self, request: Request) -> int:
        """Those of the EAGLE-3 draft."""
        return self.otherwise.num_unread(request)

    def observe(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: Features | None
    ) -> None:
        """Arguments as ``Proposer.observe``."""
        self.otherwise.observe(sequences, num_kept, features)

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
