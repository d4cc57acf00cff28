"""A rival: per sequence and step either n-grams of the context or the draft, as vLLM's pull request 24344 does."""

from __future__ import annotations

from collections.abc import Sequence

from evospec.engine.batch import Features
from evospec.engine.core import EngineCore
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import Proposer
from evospec.engine.speculation.drafters.lookup import MAX_TEXTS, NgramProposer
from evospec.engine.step_plan import DraftSlot, ScheduledSequence
from evospec.kernels.native_chain import StopRule


class HardSwitch(Proposer):
    """Either of two proposers for each sequence and step; ``otherwise`` is for those in which nothing repeats."""

    def __init__(self, otherwise: Proposer, texts: RunningTexts) -> None:
        self._otherwise, self._ngrams = otherwise, NgramProposer(texts)
        self.capture_layers, self.stops_early = otherwise.capture_layers, otherwise.stops_early

    def propose(self, slots: Sequence[DraftSlot], stop: StopRule | None = None) -> None:
        self._ngrams.propose(slots, stop)
        self._otherwise.propose([slot for slot in slots if not slot.request.draft_token_ids], stop)

    def num_unread(self, request: Request) -> int:
        return self._otherwise.num_unread(request)

    def after_verification(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: Features | None
    ) -> None:
        self._otherwise.after_verification(sequences, num_kept, features)

    def forget(self, request: Request) -> None:
        self._ngrams.forget(request)
        self._otherwise.forget(request)


def switch_hard(core: EngineCore) -> None:
    """Let an engine that drafts with EAGLE-3, and copies nothing, switch. Its costs stay those of the draft."""
    speculator = core._speculator
    assert speculator is not None
    texts = RunningTexts(MAX_TEXTS) if speculator._vocab is None else speculator._vocab.texts
    speculator._proposer = HardSwitch(speculator._proposer, texts)
