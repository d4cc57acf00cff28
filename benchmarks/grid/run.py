"""A side answers a cell's requests, and what that took each of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.in_process import PARTS, Engine, Turn
from evospec.engine.messages import EngineOutput, SamplingParams


@dataclass
class Answered:
    """One request. All times are in seconds of the side's own steps, which wait for no other side."""

    token_ids: list[int] = field(default_factory=list)
    cost: float = 0.0
    """Of each step an equal part of those that it ran beside."""
    begun: float = 0.0
    first: float | None = None
    """When its first token came, after it was sent."""
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between the steps that gave it tokens."""
    drafted: int = 0
    accepted: int = 0

    def take(self, output: EngineOutput, now: float) -> None:
        """What a step that has just ended gave it."""
        if self.first is None:
            self.first = now - self.begun
        elif output.token_ids:
            self.gaps.append(now - self.last)
        self.last = now
        self.token_ids += output.token_ids
        self.drafted += output.num_draft_tokens
        self.accepted += output.num_accepted_tokens

    def record(self) -> dict[str, Any]:
        """Without the tokens, which are those of every side."""
        return {
            "num_tokens": len(self.token_ids),
            "cost": round(self.cost, 6),
            "first": None if self.first is None else round(self.first, 6),
            "gaps": [round(gap, 5) for gap in self.gaps],
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


@dataclass
class Progress:
    """What a side has done so far."""

    requests: list[Answered]
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


def answering(engine: Engine, turns: Sequence[Turn], sampling: SamplingParams, load: int) -> Iterator[Progress]:
    """Answer all, ``load`` at a time; given back before the first step and after each."""
    progress = Progress([Answered() for _ in turns])
    waiting, running = list(zip(turns, progress.requests, strict=True))[::-1], dict[str, Answered]()
    yield progress
    while waiting or running:
        started = time.perf_counter()
        while waiting and len(running) < load:
            turn, request = waiting.pop()
            request.begun = progress.seconds
            running[engine.start(turn, sampling)] = request
        outputs, timings = engine.step()
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        for request in running.values():
            request.cost += seconds / len(running)
        for output in outputs:
            running[output.request_id].take(output, progress.seconds)
            if output.finish_reason is not None:
                del running[output.request_id]
        if timings is not None:
            parts = (timings.draft, timings.forward, timings.sample, timings.schedule + timings.commit)
            for part, of_part in zip(PARTS, parts, strict=True):
                progress.parts[part] += of_part
        yield progress
