"""Draft lengths of sequences that tests call by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request
from evospec.engine.speculation.length.adaptive import AdaptiveLength
from evospec.engine.speculation.length.costs import StepCosts
from evospec.engine.speculation.length.policy import Candidate, EarlyStop
from evospec.engine.step import Copy, Proposal

TOKEN = 7


class NamedPolicy:
    """An ``AdaptiveLength``, and a sequence for each name.

    Args:
        costs, stops_early: the policy's.
    """

    def __init__(self, costs: StepCosts, *, stops_early: bool = False) -> None:
        self.policy = AdaptiveLength(costs, stops_early=stops_early)
        self.copied: set[str] = set()
        """The sequences that are copied, of those that the last step was asked for."""
        self._requests: dict[str, Request] = {}

    def request(self, name: str, tenant: str = "t", temperature: float = 0.0) -> Request:
        """The sequence of a name; the first call says whose it is, and how its tokens are chosen."""
        if name not in self._requests:
            sampling = SamplingParams(max_tokens=1, seed=0, temperature=temperature)
            self._requests[name] = Request(name, b"", tenant, sampling, [1])
        return self._requests[name]

    def lengths(
        self,
        limits: Mapping[str, int],
        num_joining: int = 0,
        *,
        repeats: Mapping[str, Sequence[int]] | None = None,
        num_unread: int = 0,
    ) -> list[int]:
        """Of the sequences in ``limits``, each of which has so many tokens that its draft has not read."""
        copies = {name: _copy(levels) for name, levels in (repeats or {}).items()}
        candidates = [
            Candidate(self.request(name), limit, num_unread, copies.get(name)) for name, limit in limits.items()
        ]
        lengths = self.policy.lengths(candidates, num_joining)
        self.copied = {name for name, length in zip(limits, lengths, strict=True) if length.is_copied}
        return [length.num_tokens for length in lengths]

    def stop_rule(self, lengths: Mapping[str, int]) -> EarlyStop | None:
        return self.policy.stop_rule({self.request(name): length for name, length in lengths.items()})

    def worth_verifying(self, proposals: Mapping[str, Proposal]) -> dict[str, int]:
        kept = self.policy.worth_verifying({self.request(name): one for name, one in proposals.items()})
        return dict(zip(proposals, kept, strict=True))

    def record_drafts(
        self, name: str, confidence: Sequence[int], outcomes: Sequence[bool], repeat: Sequence[int] = ()
    ) -> None:
        """What became of drafts, which were so sure; ``repeat``: of what could have been copied."""
        drafts = [TOKEN] * len(outcomes)
        proposal = Proposal(drafts, drafted=drafts, confidence=confidence, copy=_copy(repeat))
        self.policy.record_drafts(self.request(name), proposal, outcomes)

    def record_copy(self, name: str, repeat: Sequence[int], outcomes: Sequence[bool]) -> None:
        self.policy.record_copy(self.request(name), Copy([TOKEN] * len(repeat), repeat), outcomes)


def _copy(levels: Sequence[int]) -> Copy | None:
    return Copy([TOKEN] * len(levels), levels) if levels else None
