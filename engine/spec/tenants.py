"""What decides each tenant's draft lengths, besides costs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from engine.spec.acceptance import Acceptance

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
    """One ``Tenant`` a name, made at first use. The least recently used is forgotten beyond ``max_tenants``."""

    def __init__(self, max_tenants: int = MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._tenants: OrderedDict[str, Tenant] = OrderedDict()

    def of(self, name: str) -> Tenant:
        """The tenant of that name; sequences that hold it keep it when it is forgotten here."""
        if name not in self._tenants:
            self._tenants[name] = Tenant()
            if len(self._tenants) > self._max_tenants:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(name)
        return self._tenants[name]
