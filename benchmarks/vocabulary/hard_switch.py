"""A rival: per sequence and step either n-grams of the context or the draft, as vLLM's pull request 24344 does."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from evospec.engine.core import EngineCore
from evospec.engine.draft_vocab.running_texts import RunningTexts
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import Proposer
from evospec.engine.speculation.drafters.lookup import MAX_TEXTS, NgramProposer
from evospec.engine.speculation.length.adaptive import AdaptiveLength
from evospec.engine.speculation.length.policy import EarlyStop, LengthPolicy
from evospec.engine.speculation.speculator import Speculator
from evospec.engine.step import DraftSlot, Proposal, Proposals


class HardSwitch(Proposer):
    """Either of two proposers for each sequence and step; ``otherwise`` is for those in which nothing repeats.

    ``otherwise`` is among the engine's learners already: this one passes nothing on to it.
    """

    def __init__(self, otherwise: Proposer, texts: RunningTexts, policy: LengthPolicy) -> None:
        self._otherwise, self._ngrams, self._policy = otherwise, NgramProposer(texts), policy
        self.stops_early = otherwise.stops_early

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        """With ``stop``, n-grams of as many tokens as are best on average: nobody knows how sure they are."""
        limited = slots
        if stop is not None:
            assert isinstance(self._policy, AdaptiveLength)
            planned = [self._policy._step[slot.request].planned for slot in slots]
            limited = [replace(one, num_tokens=min(one.num_tokens, n)) for one, n in zip(slots, planned, strict=True)]
        found = self._ngrams.propose(limited)
        proposals = {request: Proposal(one.token_ids) for request, one in found.items()}
        return {**proposals, **self._otherwise.propose([one for one in slots if one.request not in proposals], stop)}

    def num_unread(self, request: Request) -> int:
        return self._otherwise.num_unread(request)

    def end(self, request: Request) -> None:
        self._ngrams.end(request)


def switch_hard(core: EngineCore) -> None:
    """Let an engine that drafts with EAGLE-3, and copies nothing, switch. Its costs stay those of the draft."""
    speculator = core._drafter
    assert isinstance(speculator, Speculator)
    texts = RunningTexts(MAX_TEXTS) if speculator._vocab is None else speculator._vocab.texts
    speculator._proposer = HardSwitch(speculator._proposer, texts, speculator._policy)
    core._learners.append(speculator._proposer)
