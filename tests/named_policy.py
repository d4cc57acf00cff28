"""Draft lengths of sequences that tests call by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from evospec.engine.speculation.length.adaptive import AdaptiveLength
from evospec.engine.speculation.length.costs import StepCosts
from evospec.engine.speculation.length.policy import Chain, Draftable
from evospec.kernels.native_chain import StopRule


class NamedPolicy:
    """An ``AdaptiveLength``, and a sequence for each name.

    Args:
        costs, stops_early: the policy's.
    """

    def __init__(self, costs: StepCosts, *, stops_early: bool = False) -> None:
        self.policy = AdaptiveLength(costs, stops_early=stops_early)
        self.sequences: defaultdict[str, Draftable] = defaultdict(Draftable)

    def of(self, names: Sequence[str]) -> list[Draftable]:
        return [self.sequences[name] for name in names]

    def lengths(
        self,
        limits: Mapping[str, int],
        num_joining: int = 0,
        *,
        repeats: Mapping[str, Sequence[int]] | None = None,
        num_unread: int = 0,
        tenants: Mapping[str, str] | None = None,
    ) -> list[int]:
        """Of the sequences in ``limits``, each of which has so many tokens that its draft has not read."""
        for name, limit in limits.items():
            one = self.sequences[name]
            one.tenant, one.limit, one.num_unread = (tenants or {}).get(name, "t"), limit, num_unread
            one.repeat = (repeats or {}).get(name, ())
        return self.policy.lengths(self.of(list(limits)), num_joining)

    def copied(self) -> set[str]:
        """The sequences that are copied, of those that the last step was asked for."""
        return {name for name, one in self.sequences.items() if one.is_copied}

    def rests(self, names: Sequence[str]) -> bool:
        return self.policy.rests(self.of(names))

    def stop_rule(self, lengths: Mapping[str, int]) -> StopRule | None:
        return self.policy.stop_rule(self.of(list(lengths)), list(lengths.values()))

    def worth_verifying(self, chains: Mapping[str, Chain]) -> dict[str, int]:
        kept = self.policy.worth_verifying(self.of(list(chains)), list(chains.values()))
        return dict(zip(chains, kept, strict=True))

    def record_drafts(self, name: str, chain: Chain, outcomes: Sequence[bool], repeat: Sequence[int] = ()) -> None:
        self.sequences[name].repeat = repeat
        self.policy.record_drafts(self.sequences[name], chain, outcomes)

    def record_copy(self, name: str, repeat: Sequence[int], outcomes: Sequence[bool]) -> None:
        self.sequences[name].repeat = repeat
        self.policy.record_copy(self.sequences[name], outcomes)
