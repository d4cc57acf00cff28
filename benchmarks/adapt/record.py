"""What ``benchmarks.adapt`` was asked to do, and what it saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.adapt.server import Answer, Server
from benchmarks.adapt.sides import Vocabularies
from benchmarks.common.drafting import Drafting
from benchmarks.prompts.build import Prompt

STREAM, HELD_OUT, RETURN = "stream", "held-out", "return"
"""Phases: learning; held-out prompts after it, and again after another topic."""


@dataclass(frozen=True)
class Plan:
    """What one part measures. ``seconds`` is its bound, loading not included.

    ``options`` of ``engine.alignment`` for all sides; ``pause``: a client's after each answer of a stream, in times of
    what that took; ``rest``: seconds after a stream of part ``gain`` in which workers may go on, not counted in
    ``seconds``; ``clients`` and ``tokens``: of a stream, at most; ``prompts``: held-out ones of each domain, trial
    prompts if ``trial``; ``rounds``, the number of the first, and ``concurrency`` of part ``load``.
    """

    part: str
    model: str
    sides: list[str]
    vocabularies: Vocabularies
    options: list[str]
    domains: list[str]
    seconds: float
    pause: float
    rest: float
    clients: int
    tokens: int | None
    prompts: int
    trial: bool
    max_tokens: int
    drafting: Drafting
    rounds: int
    concurrency: int
    first_round: int = 0


@dataclass(frozen=True)
class Prompts:
    """By domain: to learn from, and to measure with. No prompt is in both, nor near one."""

    stream: dict[str, list[Prompt]]
    held_out: dict[str, list[Prompt]]


class Record:
    """A results file that grows.

    Args:
        path: of the JSON file.
        plan: what is measured.
        environment: machine, versions, settings.
    """

    def __init__(self, path: Path, plan: Plan, environment: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = {
            "plan": asdict(plan),
            "environment": environment,
            "answers": [],
            "states": [],
            "runs": [],
        }

    def answer(self, server: Server, phase: str, answer: Answer) -> None:
        """A request's."""
        self.content["answers"].append({"side": server.side.name, "phase": phase} | asdict(answer))

    def state(self, server: Server, tenant: str, at: float) -> None:
        """What a side's worker says of a tenant's adapter, ``at`` seconds after the stream began."""
        worker = server.status()[0]
        about = {name: worker.get(name) for name in ("lag", "is_paused", "num_records", "num_lapsed")}
        labels = {"side": server.side.name, "tenant": tenant, "at": at}
        self.content["states"].append(labels | about | server.adapter(tenant))

    def run(self, **values: Any) -> None:
        """Of parts ``memory`` and ``load``."""
        self.content["runs"].append(values)

    def save(self) -> None:
        """Replace the file."""
        self._path.write_text(json.dumps(self.content))
