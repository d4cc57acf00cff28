"""What the step loop asks of optional parts: a drafter proposes, learners follow. Neither changes a request.

What raises in one of them is counted under the name of its ``part`` and costs speed only (``engine.optional_parts``).
Both keep what they know of a sequence themselves, and drop it at its ``end``. A new one is a subclass, and a line in
``engine.speculation.build.make_speculation``.
"""

from __future__ import annotations

from collections.abc import Sequence

from evospec.engine.messages import EngineOutput, EngineStats, TokenSource
from evospec.engine.request import Request
from evospec.engine.step import Decodes, DraftSlot, Proposals, Step, StepClock


class Drafter:
    """Proposes draft tokens; this one proposes none."""

    def lengths(self, decodes: Decodes) -> list[int]:
        """How many tokens to draft for each of ``decodes.requests``, at most its limit."""
        return [0] * len(decodes.requests)

    def propose(self, slots: Sequence[DraftSlot]) -> Proposals:
        """Draft tokens, at most ``slot.num_tokens`` each; who is left out gets none."""
        return {}

    def source(self, token_id: int) -> TokenSource:
        """Where a token comes from that was drafted, not copied."""
        return "draft"


class Learner:
    """Follows all steps, and the beginning and the end of each request; does nothing where a subclass says nothing."""

    part: str
    """Its name in metrics, logs and ``/health``; several learners may be one part."""

    def begin(self, request: Request) -> None:
        """A request has come; it may wait for a while."""

    def learn(self, step: Step) -> None:
        """A step is verified, and not committed yet."""

    def measured(self, step: Step, clock: StepClock) -> None:
        """A step is over, which has taken so long."""

    def preempt(self, request: Request) -> None:
        """A request has lost its blocks: it will be computed again from its cached prefix on."""

    def finish(self, request: Request, output: EngineOutput) -> EngineOutput:
        """A request has its last tokens: its last output, to which a learner may add what its session keeps."""
        return output

    def end(self, request: Request) -> None:
        """A request has ended, or was aborted: nothing of it is needed any more. It may not have begun."""

    def add_stats(self, stats: EngineStats) -> EngineStats:
        """The engine's statistics with those of the learner."""
        return stats
