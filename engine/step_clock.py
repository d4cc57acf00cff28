"""What the parts of a step take."""

from __future__ import annotations

import time
from typing import Literal

from engine.messages import StepTimings
from engine.step_plan import SchedulerOutput

Part = Literal["schedule", "draft", "forward", "sample", "commit"]


class StepClock:
    """Measures a step from its beginning on, part after part."""

    def __init__(self) -> None:
        self._seconds: dict[Part, float] = dict.fromkeys(("schedule", "draft", "forward", "sample", "commit"), 0.0)
        self._last = time.perf_counter()

    def lap(self, part: Part) -> None:
        """A part of the step ends; a part may come more than once."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """Of all parts so far."""
        return sum(self._seconds.values())

    def seconds_without(self, part: Part) -> float:
        """Of all parts so far but one."""
        return self.seconds - self._seconds[part]

    def timings(self, plan: SchedulerOutput, vocabulary: float) -> StepTimings:
        """The step is over; ``vocabulary``: the seconds of its drafting in which vocabularies learned."""
        return StepTimings(
            **self._seconds, num_tokens=plan.num_tokens, num_sequences=len(plan.sequences), vocabulary=vocabulary
        )
