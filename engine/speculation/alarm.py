"""Tells the operator of a draft that is hardly ever right."""

from __future__ import annotations

import structlog

log = structlog.get_logger(__name__)

_CHAINS = 200
"""Chains of draft tokens that are looked at together."""
_SUSPICIOUS = 1.2
"""Mean tokens a verification, with the target's own, below which something is wrong: a poor draft has 1.5."""


class AcceptanceAlarm:
    """Warns once. Such a draft costs time and no answer: most often it takes the outputs of the wrong layers."""

    def __init__(self) -> None:
        self._num_chains = self._num_right = 0
        self._has_warned = False

    def record(self, num_right: int) -> None:
        """A chain was verified, and so many of its first tokens were right."""
        self._num_chains, self._num_right = self._num_chains + 1, self._num_right + num_right
        if self._num_chains < _CHAINS:
            return
        length = 1 + self._num_right / self._num_chains
        self._num_chains = self._num_right = 0
        if length < _SUSPICIOUS and not self._has_warned:
            self._has_warned = True
            hint = "is the draft for this model, and of which layers (speculation.capture_layers)?"
            log.warning("the draft is hardly ever right", acceptance_length=round(length, 2), chains=_CHAINS, hint=hint)
