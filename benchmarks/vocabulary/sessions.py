"""Engines that answer in sessions, as a server would have them: a session's snapshot goes from request to request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from rich.progress import track

from benchmarks.common.acceptance import Run
from benchmarks.common.drafting import FIXED_LENGTH, Drafting
from benchmarks.common.environment import environment
from benchmarks.common.in_process import Engine, Generation, Turn, load_target, take_turns
from benchmarks.common.machine import RESULTS
from benchmarks.prompts.build import Messages
from benchmarks.vocabulary.hard_switch import switch_hard
from benchmarks.vocabulary.modes import Mode, make_mode, sizes_of
from evospec.engine.loader import LoadedModel
from evospec.engine.messages import EngineReady, SamplingParams, SessionState

CONVERSATION_TOKENS = 600
"""A conversation's prompt leaves its oldest turns out beyond."""
FIXED = Drafting()
"""The shipped draft, with drafts of always the same length."""
Labels = Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request; ``domain`` is the client's name for the session's subject, "" if it gives none."""

    messages: Messages
    session: str
    tenant: str
    domain: str = ""
    goes_on: bool = False
    """The session's earlier turns come before the messages."""


@dataclass
class _Session:
    snapshot: bytes = b""
    messages: Messages = field(default_factory=list)


class SessionSide:
    """One mode's engine, ready; ``target``: loaded already, None: it has its own."""

    def __init__(self, mode: Mode, target: LoadedModel | None = None) -> None:
        self.mode = mode
        self._engine = Engine(mode.config, target)
        if mode.switches:
            switch_hard(self._engine.core)
        self._sessions: dict[str, _Session] = {}
        self._strangers = count()

    @property
    def introduction(self) -> EngineReady:
        """The engine's, as a server would get it."""
        return self._engine.core.introduction

    def answering(self, ask: Ask, max_tokens: int) -> Iterator[Generation]:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
        return self._engine.answering([self._turn(ask)], sampling, 1)

    def keep(self, ask: Ask, run: Generation) -> None:
        """Take over what a request's session has come to."""
        session = self._sessions[ask.session]
        session.snapshot = run.snapshots[0] or b""
        session.messages.append({"role": "assistant", "content": self._engine.tokenizer.decode(run.answers[0])})

    def _turn(self, ask: Ask) -> Turn:
        session = self._sessions.setdefault(ask.session, _Session())
        session.messages = [*(session.messages if ask.goes_on else []), *ask.messages]
        prompt = self._encode(session.messages)
        while len(prompt) > CONVERSATION_TOKENS and len(session.messages) > len(ask.messages) + 1:
            session.messages = session.messages[2:]
            prompt = self._encode(session.messages)
        if self.mode.cold:
            return Turn(prompt, f"stranger-{next(self._strangers)}")
        return Turn(prompt, ask.tenant, SessionState(snapshot=session.snapshot, domain=ask.domain))

    def _encode(self, messages: Messages) -> list[int]:
        return self._engine.tokenizer.encode_messages(messages)


def make_sides(names: Sequence[str], model: str, drafting: Drafting = FIXED) -> list[SessionSide]:
    """One for each mode; they share the target."""
    num_special = sizes_of(model).num_special
    modes = [make_mode(name, model, drafting, num_special) for name in names]
    target = load_target(modes[0].config)
    return [SessionSide(mode, target) for mode in modes]


def answers(
    sides: Sequence[SessionSide], asks: Iterable[tuple[Labels, Ask]], max_tokens: int
) -> Iterator[tuple[dict[str, Any], Generation]]:
    """What each side makes of each request, before the next one; its labels, and the mode's name.

    All sides take turns, step by step, so that a slow minute of the machine is everybody's.
    """
    for labels, ask in track(list(asks), description="requests"):
        runs = take_turns([side.answering(ask, max_tokens) for side in sides])
        for side, run in zip(sides, runs, strict=True):
            side.keep(ask, run)
            yield {"mode": side.mode.name, **labels}, run


def counts(run: Generation) -> dict[str, int]:
    """For ``benchmarks.common.acceptance``: drafts of the same length alone, so none that an answer's end cut short."""
    accepted = [accepted for drafted, accepted in run.verified if drafted == FIXED_LENGTH]
    return {"drafts": len(accepted), "accepted": sum(accepted)}


def recorded(name: str, plan: Mapping[str, Any], runs: Iterable[Run]) -> list[Run]:
    """All runs; ``benchmarks/results/NAME.json`` is written again after each of them."""
    done: list[Run] = []
    record = {"plan": plan, "environment": environment(), "runs": done}
    for run in runs:
        done.append(run)
        (RESULTS / f"{name}.json").write_text(json.dumps(record))
    return done
