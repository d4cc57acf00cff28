"""Faults of all processes and of the memory they share, while requests run: ``python -m benchmarks.faults``.

A real server with alignment on, its own Valkey and its own worker, of a tiny random model in float32. Every answer is
compared, token by token, with that of a server that has neither draft nor fault.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.faults.kinds import FAULTS, Fault, Missed
from benchmarks.faults.model import FaultModel
from benchmarks.faults.report import Seen, table
from benchmarks.faults.requests import (
    CLIENTS,
    MAX_TOKENS,
    Answer,
    Finished,
    Outcome,
    Question,
    asking,
    known_answers,
    make_questions,
)
from benchmarks.faults.server import (
    TENANTS,
    UNKNOWN,
    LauncherEnded,
    Server,
    State,
    serving,
    shared_directory,
    undisturbed,
    worker_options,
)
from benchmarks.faults.watch import Versions, watching

LIVES = 4
"""Times that one process of a server is killed: the launcher waits half a second before it starts it again, then one
second, two, four, unless it has lived for a minute."""
LEARN_SECONDS = 300.0
RECOVER_SECONDS = 90.0


@dataclass(frozen=True)
class Bench:
    """What all faults share. Versions go on from one server to the next."""

    model: FaultModel
    questions: list[Question]
    expected: list[Answer]
    versions: Versions = field(default_factory=Versions)

    def load(self, server: Server) -> AbstractContextManager[list[Finished]]:
        return asking(server.url, self.questions, self.expected, server.keys, self.versions.floors)


def is_learned(state: State) -> str:
    """Whether each tenant has a version that outlives the worker."""
    known = {key: one["good_revision"] for key, one in state.adapters.items()}
    return state.disagreement if len(known) == len(TENANTS) and all(known.values()) else f"good revisions: {known}"


def learn(bench: Bench) -> None:
    """Let the worker learn a version for each tenant.

    Raises:
        TimeoutError: it does not.
        RuntimeError: an answer was wrong, though nothing was hurt.
    """
    with serving(bench.model, "learning") as server, bench.load(server) as finished:
        server.wait(is_learned, LEARN_SECONDS)
    if wrong := [one for one in finished if one.outcome is not Outcome.RIGHT]:
        raise RuntimeError(f"{len(wrong)} of {len(finished)} answers before the first fault: {wrong[0].message}")


def repeat(server: Server, fault: Fault, chance: random.Random, seen: Seen) -> bool:
    """Inject a fault and wait until everything is as before; False: it is not, or nothing is known any more."""
    before = server.state()
    try:
        way = fault.inject(server, chance)
    except Missed:
        seen.missed += 1
        server.wait(lambda state: state.disagreement, RECOVER_SECONDS)
        return True
    except (*UNKNOWN, RuntimeError) as error:
        seen.not_recovered.append(f"{type(error).__name__}: {error}")
        return False
    started, injected_at = time.monotonic(), time.time()

    def is_as_before(state: State) -> str:
        if problem := state.disagreement or fault.has_shown(before, state):
            return problem
        is_same_worker = state.worker["pid"] == before.worker["pid"]
        known = before.worker["num_records"] if is_same_worker else 0
        has_worked = state.worker["updated_at"] > injected_at and state.worker["num_records"] > known
        return "" if has_worked else f"the worker reads nothing: {state.worker}"

    seen.ways[way] += 1
    try:
        since = server.wait(is_as_before, RECOVER_SECONDS)
    except TimeoutError as error:
        seen.not_recovered.append(str(error))
        return False
    seen.seconds.append(round(since - started, 2))
    return True


class Tally:
    """What each fault did, and which one's turn it is.

    ``repeats``: wanted of each. What is added to ``versions`` belongs to the fault at the time.
    """

    def __init__(self, names: Sequence[str], repeats: int, versions: Versions) -> None:
        self.seen = {name: Seen(FAULTS[name].about, FAULTS[name].kills_engine) for name in names}
        self.chance = {name: random.Random(name) for name in names}
        self._repeats, self._versions = repeats, versions
        self._num_violations = self._num_versions = 0

    def next(self) -> str | None:
        """The one with the fewest repeats; None: all have enough."""
        name = min(self.seen, key=lambda name: self.seen[name].repeats)
        return name if self.seen[name].repeats < self._repeats else None

    def take(self, name: str, finished: Sequence[Finished]) -> None:
        """These requests, and all that was seen of versions since the last call, belong to a fault."""
        seen, versions = self.seen[name], self._versions
        seen.take(finished)
        for one in finished:
            versions.observe_answer(one.tenant, one.version, one.floor)
        seen.violations += versions.violations[self._num_violations :]
        seen.num_versions += versions.num_seen - self._num_versions
        self._num_violations, self._num_versions = len(versions.violations), versions.num_seen


def hurt(bench: Bench, tally: Tally, deadline: float) -> None:
    """All faults in turn, until one process of the server was killed too often, or one did not recover."""
    num_taken, is_sound, name = 0, True, tally.next()
    with serving(bench.model, "serving") as server, watching(server, bench.versions):
        with bench.load(server) as of_all:
            server.wait(lambda state: state.disagreement, RECOVER_SECONDS)
            while name and is_sound and max(server.num_killed.values(), default=0) < LIVES:
                last = name
                is_sound = repeat(server, FAULTS[name], tally.chance[name], tally.seen[name])
                finished = of_all[num_taken:]
                num_taken += len(finished)
                tally.take(name, finished)
                name = tally.next() if time.monotonic() < deadline else None
        tally.take(last, of_all[num_taken:])  # under way when the last fault was over


def measure(names: Sequence[str], repeats: int, minutes: float, path: Path, console: Console) -> bool:
    """All faults in turn, again and again; the JSON file grows meanwhile. Whether all is as promised."""
    deadline = time.monotonic() + 60 * minutes
    record: dict[str, Any] = {
        "plan": {"faults": list(names), "repeats": repeats, "clients": CLIENTS, "max_tokens": MAX_TOKENS},
        "environment": environment(),
        "launchers_ended": 0,
        "faults": {},
    }
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evospec-faults-")))
        shared = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="evospec-faults-", dir=shared_directory()))
        )
        model = FaultModel.make(directory, worker_options(directory, shared))
        questions = make_questions(model.target.name, TENANTS)
        with undisturbed(model) as url:
            bench = Bench(model, questions, known_answers(url, questions))
        learn(bench)
        console.print("[dim]answers known, each tenant has an adapter[/dim]")
        tally = Tally(names, repeats, bench.versions)
        while tally.next() is not None and time.monotonic() < deadline:
            try:
                hurt(bench, tally, deadline)
            except LauncherEnded:
                record["launchers_ended"] += 1
            record["faults"] = {name: seen.record() for name, seen in tally.seen.items()}
            path.write_text(json.dumps(record, indent=1))
            console.print(f"[dim]{ {name: seen.repeats for name, seen in tally.seen.items()} }[/dim]")
    console.print(table(record))
    return not record["launchers_ended"] and all(one["holds"] for one in record["faults"].values())


def main(
    fault: Annotated[list[str] | None, typer.Option(help=f"Repeatable, of {', '.join(FAULTS)}; default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of each fault.")] = 50,
    minutes: Annotated[float, typer.Option(min=1, help="Most time for all of it.")] = 75.0,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "faults",
) -> None:
    """Kills, fills and damages what alignment consists of; exits with 1 if a request or a recovery fails."""
    names = fault or list(FAULTS)
    if unknown := set(names) - FAULTS.keys():
        raise typer.BadParameter(f"no such fault: {', '.join(sorted(unknown))}", param_hint="--fault")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, console = RESULTS / f"{name}.json", Console(width=180)
    holds = measure(names, repeats, minutes, path, console)
    console.print(str(path))
    raise typer.Exit(0 if holds else 1)


if __name__ == "__main__":
    typer.run(main)
