"""How likely a draft token is to be accepted: by its place, by its sequence, and by how sure of it the draft is.

What verification shows is kept tenant by tenant. Draft lengths are in the responses, so an average over all tenants
would tell each of them how well the others' texts can be drafted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from evospec.engine.config import MAX_SPECULATIVE_TOKENS
from evospec.kernels.native_chain import CONFIDENCE_LEVELS

MAX_ACCEPTANCE = 0.98
_PRIOR_ACCEPTANCE, _PRIOR_TRIALS = 0.7, 10.0
"""Optimistic, so that a new draft is tried."""
_MEMORY = 0.995
"""Weight of the past in a tenant's averages, for each trial."""
_SEQUENCE_MEMORY = 0.9
"""The same in a sequence's own, for each verified step."""
IDLE_MEMORY = 0.98
"""The same for each step without a draft: an old failure is forgotten, and the sequence tried again."""
_SEQUENCE_PRIOR = 2.0
"""Tokens that are taken to have been accepted as expected before the first."""


@dataclass(slots=True)
class Ratio:
    """How the drafts of a sequence, or at repeats of a level, fare against the average of the tenant's.

    The ratio is accepted / expected, with fading memory.
    """

    accepted: float = 0.0
    expected: float = 0.0

    @property
    def value(self) -> float:
        return (self.accepted + _SEQUENCE_PRIOR) / (self.expected + _SEQUENCE_PRIOR)

    def fade(self, memory: float) -> None:
        self.accepted *= memory
        self.expected *= memory


@dataclass(slots=True)
class _Shares:
    """Fading averages of trials, one for each of some kinds."""

    accepted: list[float]
    trials: list[float]

    @classmethod
    def expecting(cls, shares: Sequence[float]) -> _Shares:
        return cls([_PRIOR_TRIALS * share for share in shares], [_PRIOR_TRIALS] * len(shares))

    def __getitem__(self, kind: int) -> float:
        return self.accepted[kind] / self.trials[kind]

    def add(self, kind: int, accepted: bool) -> None:
        self.accepted[kind] = self.accepted[kind] * _MEMORY + accepted
        self.trials[kind] = self.trials[kind] * _MEMORY + 1.0


def _kinds() -> tuple[_Shares, _Shares]:
    """A draft is right more often than it thinks: it is trained on few tokens, and less sharp than its target."""
    expected = [((level + 0.5) / CONFIDENCE_LEVELS) ** 0.5 for level in range(CONFIDENCE_LEVELS)]
    return _Shares.expecting(expected), _Shares.expecting(expected)


@dataclass(slots=True)
class Acceptance:
    """What verification has shown so far of one tenant's drafts.

    A trial is a draft token whose target's choice is known, all drafts before it having been right. Where a sequence's
    end repeats, its draft, which follows repeats too, fares better: by the level of what could be copied first.
    """

    _places: _Shares = field(default_factory=lambda: _Shares.expecting([_PRIOR_ACCEPTANCE] * MAX_SPECULATIVE_TOKENS))
    _levels: tuple[_Shares, _Shares] = field(default_factory=_kinds)
    """By confidence, of greedy and of sampled tokens."""
    _copies: tuple[_Shares, _Shares] = field(default_factory=_kinds)
    """The same of copies, by the level of the repeat."""
    _repeats: list[Ratio] = field(default_factory=lambda: [Ratio() for _ in range(CONFIDENCE_LEVELS + 1)])
    """How drafts fare where the end does not repeat, and where it does, by level."""

    def of_places(self, sequence: Ratio, limit: int, repeat: Sequence[int]) -> list[float]:
        """[limit] chance of a sequence's first, second, .. draft, given that those before it are accepted."""
        ratio = sequence.value * self._of_repeat(repeat).value
        return [min(self._places[place] * ratio, MAX_ACCEPTANCE) for place in range(limit)]

    def of_levels(self) -> list[list[float]]:
        """[2][CONFIDENCE_LEVELS] chance of a greedy and of a sampled token, by how sure of it the draft is."""
        return [[shares[level] for level in range(CONFIDENCE_LEVELS)] for shares in self._levels]

    def of_drafts(self, confidence: Sequence[int], *, greedy: bool, copied: bool = False) -> list[float]:
        """Chance of each draft of a chain, given that those before it are accepted."""
        shares = (self._copies if copied else self._levels)[not greedy]
        return [min(shares[level], MAX_ACCEPTANCE) for level in confidence]

    def record_drafts(
        self, sequence: Ratio, outcomes: Sequence[bool], confidence: Sequence[int], greedy: bool, repeat: Sequence[int]
    ) -> None:
        """Trials of one sequence's chain, place by place; ``confidence`` is empty where it is not known."""
        of_repeat = self._of_repeat(repeat)
        sequence.fade(_SEQUENCE_MEMORY)
        of_repeat.fade(_MEMORY)
        for place, accepted in enumerate(outcomes):
            expected = self._places[place]
            # Each is to explain what the other does not.
            sequence.expected += min(expected * of_repeat.value, MAX_ACCEPTANCE)
            of_repeat.expected += min(expected * sequence.value, MAX_ACCEPTANCE)
            sequence.accepted += accepted
            of_repeat.accepted += accepted
            self._places.add(place, accepted)
        for level, accepted in zip(confidence, outcomes, strict=False):
            self._levels[not greedy].add(level, accepted)

    def record_copy(self, outcomes: Sequence[bool], levels: Sequence[int], greedy: bool) -> None:
        """Trials of what could have been copied, whether it was or not."""
        for level, accepted in zip(levels, outcomes, strict=False):
            self._copies[not greedy].add(level, accepted)

    def _of_repeat(self, levels: Sequence[int]) -> Ratio:
        return self._repeats[levels[0] + 1 if levels else 0]


MAX_TENANTS = 1024
"""So many tenants are remembered, each in some 10 kB."""
_SHARE_RATE = 0.1
"""Weight of a step in the share of sequences that are drafted for."""
_IDLE_INTERVAL = 16
"""Where a tenant got no drafts for some steps, lengths are worked out so seldom, until the batch changes."""
_PROBE_INTERVAL, _PROBE_STEPS = 256, 8
"""A tenant without drafts gets some for one sequence every so many steps, for some steps, to see whether they pay."""


@dataclass(slots=True, eq=False)
class Tenant:
    """How one tenant's drafts have fared. Nothing in it depends on other tenants' texts."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    drafted_share: float = 1.0
    """How many of its sequences are drafted for, on average with fading memory."""
    _idle_steps: int = 0
    """Steps in a row in which none of its sequences was worth drafting for."""

    @property
    def rests(self) -> bool:
        """Whether lengths need not be worked out in this step, if the batch is that of the last one."""
        return self._idle_steps >= _PROBE_STEPS and self._idle_steps % _IDLE_INTERVAL != 0

    @property
    def is_probed(self) -> bool:
        """Whether a sequence of it is to be drafted for though that seems not to pay."""
        return self._idle_steps >= _PROBE_INTERVAL and self._idle_steps % _PROBE_INTERVAL < _PROBE_STEPS

    def take_step(self, is_worth_drafting: bool) -> None:
        """A step begins, in which some sequence of the tenant is worth drafting for, or none is."""
        self._idle_steps = 0 if is_worth_drafting else self._idle_steps + 1

    def take_drafted(self, share: float) -> None:
        """A step drafts for this share of the tenant's sequences, a probed one included."""
        self.drafted_share += (share - self.drafted_share) * _SHARE_RATE


class Tenants:
    """One ``Tenant`` a name, made at first use. The least recently used is forgotten beyond ``MAX_TENANTS``."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, Tenant] = OrderedDict()

    def of(self, name: str) -> Tenant:
        """The tenant of that name; sequences that hold it keep it when it is forgotten here."""
        if name not in self._tenants:
            self._tenants[name] = Tenant()
            if len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(name)
        return self._tenants[name]
