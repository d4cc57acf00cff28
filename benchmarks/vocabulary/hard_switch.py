"""A rival: per sequence and step either n-grams of the context or the draft, as vLLM's pull request 24344 does."""

from __future__ import annotations

from collections.abc import Sequence

from evospec.engine.core import EngineCore
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import Proposer
from evospec.engine.speculation.drafters.lookup import MAX_TEXTS, NgramProposer
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.speculation.speculator import Speculator
from evospec.engine.step import DraftSlot, Proposals


class HardSwitch(Proposer):
    """Either of two proposers for each sequence and step; ``otherwise`` is for those in which nothing repeats.

    Of the engine's learners is who drafts otherwise; this one is to be told of the ends of requests.
    """

    def __init__(self, otherwise: Proposer, texts: RunningTexts) -> None:
        self._otherwise, self._ngrams = otherwise, NgramProposer(texts)
        self.stops_early = otherwise.stops_early

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        copied = self._ngrams.propose(slots)
        return {**copied, **self._otherwise.propose([slot for slot in slots if slot.request not in copied], stop)}

    def num_unread(self, request: Request) -> int:
        return self._otherwise.num_unread(request)

    def end(self, request: Request) -> None:
        self._ngrams.end(request)


def switch_hard(core: EngineCore) -> None:
    """Let an engine that drafts with EAGLE-3, and copies nothing, switch. Its costs stay those of the draft."""
    speculator = core._drafter
    assert isinstance(speculator, Speculator)
    texts = RunningTexts(MAX_TEXTS) if speculator._vocab is None else speculator._vocab.texts
    speculator._proposer = HardSwitch(speculator._proposer, texts)
    core._learners.append(speculator._proposer)
