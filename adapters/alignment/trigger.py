"""When an update is worth its compute (the lesson of SpecBlock: train where it pays, not at every chance)."""

from __future__ import annotations

import time
from collections.abc import Callable

from evospec.adapters.alignment.guard import FirstTokenAcceptance
from evospec.engine.adapters_config import PaceConfig

_OPTIMISM = 0.05
"""An update of a key that nobody knows yet is taken to save so much loss, in nats."""
_SMOOTHING = 0.3
_DRIFT, _SIGMAS = 0.05, 3.0
"""Live acceptance that fell by so much, beyond so many standard errors, makes a key worth a try again.

tests/unit/test_guard.py has the false alarms."""
_MAX_PATIENCE = 8
"""A key waits for at most so many batches, so that one whose traffic changes too little to show is tried as well."""
_RATE_SECONDS = 600.0
"""The rate of steps is a mean over so long: a pause between two conversations does not mean that nobody comes again."""
_YOUNG_SECONDS = 60.0
"""Nothing is taken to have come so long before a key began: its first records may be what waited in the log."""


class UpdateTrigger:
    """Weighs, for one key, the seconds that an update costs against those that it is likely to save.

    An update is likely to save the loss that the last ones did on held-out positions, measured when a version is
    scored. A nat of loss is taken as a factor of e on the chance that a draft is accepted, so saving d of it saves
    about a share d of the verify steps to come: ``outlook_seconds`` of the present rate, ``step_seconds`` each. What an
    update costs includes its share of the scoring that follows on several.

    A key that learns nothing more gets its next update after ever more new positions (twice, four, eight times a
    batch), or at once when its live acceptance falls. While the machine is idle, every new position is learned from:
    what was learned may be of another topic, and acceptance need not fall where the topic changes.
    """

    def __init__(self, config: PaceConfig, batch_positions: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._batch, self._clock = config, batch_positions, clock
        self._steps_per_second = 0.0
        self._began_at = self._counted_at = clock()
        self._patience = 1
        # Now, and when weights were scored: the last that enough was known of.
        self._latest = self._scored = FirstTokenAcceptance()
        self.gain = _OPTIMISM  # held-out loss that an update saves, in nats
        self.seconds: float | None = None  # what an update takes
        self._scoring_seconds = 0.0  # what scoring takes, for each of the updates that it is for

    def add_steps(self, count: int) -> None:
        """``count`` verify steps of the key were logged since the last call."""
        now = self._clock()
        elapsed = max(now - self._counted_at, 1e-3)
        weight = min(1.0, elapsed / min(_RATE_SECONDS, _YOUNG_SECONDS + now - self._began_at))
        self._steps_per_second += weight * (count / elapsed - self._steps_per_second)
        self._counted_at = now

    def compare_acceptance(self, acceptance: FirstTokenAcceptance) -> None:
        """Take the recent acceptance; a fall since the last score means that there is something to learn again."""
        if acceptance.is_below(self._scored, _DRIFT, _SIGMAS):
            self.gain, self._patience, self._scored = _OPTIMISM, 1, acceptance
        elif not self._scored.is_comparable:
            self._scored = acceptance
        self._latest = acceptance

    def add_update(self, seconds: float) -> None:
        """An update took so long."""
        self.seconds = seconds if self.seconds is None else self.seconds + _SMOOTHING * (seconds - self.seconds)

    def add_score(self, saved: float, num_updates: int, scoring_seconds: float = 0.0) -> None:
        """``num_updates`` updates saved so much held-out loss together (negative: they cost).

        ``scoring_seconds`` is what it took to find out, for each update since the last score.
        """
        self.gain += _SMOOTHING * (max(0.0, saved) / num_updates - self.gain)
        self._scoring_seconds += _SMOOTHING * (scoring_seconds - self._scoring_seconds)
        self._patience = 1 if self.pays else min(2 * self._patience, _MAX_PATIENCE)
        if self._latest.is_comparable:  # else, as after a new version, a fall would find nothing to be below
            self._scored = self._latest

    @property
    def pays(self) -> bool:
        """Whether an update saves more than it costs."""
        saved = self.gain * self._steps_per_second * self._config.outlook_seconds * self._config.step_seconds
        return self.seconds is None or saved >= self.seconds + self._scoring_seconds

    def wants_update(self, num_new_positions: int, num_arrived: int, machine_is_idle: bool = False) -> bool:
        """Whether so many new positions are worth an update now.

        Args:
            num_arrived: positions since the last ones were learned from, those included that nobody keeps any more.
            machine_is_idle: an update costs nobody anything.
        """
        if max(num_new_positions, num_arrived) < self._batch:
            return False
        is_free = machine_is_idle and num_new_positions >= self._batch
        return is_free or self.pays or num_arrived >= self._batch * max(2, self._patience)
