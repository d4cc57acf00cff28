"""An engine and the sessions it answers in, as a server would: each one's snapshot goes from request to request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

from benchmarks.common.in_process import Engine, Generation, Turn, take_turns
from benchmarks.common.process import NoiseMeter
from benchmarks.prompts.build import Prompt
from benchmarks.vocabulary.hard_switch import switch_hard
from benchmarks.vocabulary.modes import Mode
from engine.loader import LoadedModel
from engine.messages import EngineReady, SamplingParams, SessionState
from engine.process import introduction

CONVERSATION_TOKENS = 600
"""A conversation's prompt leaves its oldest turns out beyond."""


@dataclass(frozen=True)
class Ask:
    """One request; ``domain`` is the client's name for the session's subject, "" if it gives none.

    ``max_tokens``: of its answer, if not as many as the unit's.
    """

    prompt: Prompt
    session: str
    tenant: str
    domain: str = ""
    max_tokens: int | None = None


@dataclass(frozen=True)
class Unit:
    """Requests that every mode answers before the next ones.

    ``labels`` go into the record. ``whole``: always ``max_tokens``, whatever the model says. ``conversation``: the
    session's earlier turns come before the prompt.
    """

    labels: dict[str, Any]
    asks: Sequence[Ask]
    max_tokens: int
    concurrency: int = 1
    whole: bool = False
    conversation: bool = False
    with_steps: bool = False
    """Record the times of every step."""


@dataclass
class _Session:
    snapshot: bytes = b""
    messages: list[dict[str, str]] = field(default_factory=list)


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
        return introduction(self.mode.config, self._engine.core, self.mode.config.model.name, epoch="")

    def snapshot(self, session: str) -> bytes:
        """What a session's last request has left; empty if it kept nothing."""
        return self._sessions[session].snapshot

    def answering(self, unit: Unit) -> Iterator[Generation]:
        """Greedy answers, step by step. A session may come once in a unit."""
        turns = [self._turn(ask, unit.conversation) for ask in unit.asks]
        sampling = SamplingParams(max_tokens=unit.max_tokens, seed=0, temperature=0.0, ignore_eos=unit.whole)
        return self._engine.answering(turns, sampling, unit.concurrency)

    def keep(self, unit: Unit, run: Generation) -> dict[str, Any]:
        """Take over what a unit's sessions have come to; what came of it, for the record."""
        speculation = self.mode.config.speculation
        length = None if speculation.adaptive else speculation.num_speculative_tokens
        result = summarise(run, length, unit.with_steps)
        for ask, answer, snapshot in zip(unit.asks, run.answers, run.snapshots, strict=True):
            self._keep(ask, answer, snapshot)
        return unit.labels | {"mode": self.mode.name} | result

    def _turn(self, ask: Ask, conversation: bool) -> Turn:
        session = self._sessions.setdefault(ask.session, _Session())
        earlier = session.messages if conversation else []
        session.messages = [*earlier, *ask.prompt.messages]
        prompt = self._encode(session.messages)
        while len(prompt) > CONVERSATION_TOKENS and len(session.messages) > len(ask.prompt.messages) + 1:
            session.messages = session.messages[2:]
            prompt = self._encode(session.messages)
        if self.mode.cold:
            return Turn(prompt, f"stranger-{next(self._strangers)}", max_tokens=ask.max_tokens)
        state = SessionState(snapshot=session.snapshot, domain=ask.domain)
        return Turn(prompt, ask.tenant, state, ask.max_tokens)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self._engine.tokenizer
        return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def _keep(self, ask: Ask, answer: list[int], snapshot: bytes | None) -> None:
        session = self._sessions[ask.session]
        session.snapshot = snapshot or b""
        session.messages.append({"role": "assistant", "content": self._engine.tokenizer.decode(answer)})


def measure_unit(sides: Sequence[SessionSide], unit: Unit) -> list[dict[str, Any]]:
    """All modes answer, taking steps in turn; what came of it, for the record."""
    noise = NoiseMeter()
    runs = take_turns([side.answering(unit) for side in sides])
    others = {"noise": noise.read()}
    return [side.keep(unit, run) | others for side, run in zip(sides, runs, strict=True)]


def summarise(run: Generation, draft_length: int | None, with_steps: bool) -> dict[str, Any]:
    """What a record keeps of a run.

    Args:
        run: of one mode and unit.
        draft_length: acceptance only of drafts that long; None: of all.
        with_steps: keep the milliseconds of every step without a prompt, too.
    """
    counts = [vocabulary for vocabulary in run.vocabularies if vocabulary is not None]
    steps = run.decode_steps
    result: dict[str, Any] = {
        "tokens": run.num_tokens,
        "seconds": run.seconds,
        "decode_tokens": run.decode_tokens,
        "decode_seconds": run.decode_seconds,
        "decode_steps": len(steps),
        "retrieval_seconds": sum(step.vocabulary for step in steps),
        "acceptance": asdict(run.acceptance(draft_length)),
        "verified": sum(vocabulary.verified_tokens for vocabulary in counts),
        "covered": sum(vocabulary.covered_tokens for vocabulary in counts),
        "tail_tokens": [vocabulary.tail_tokens for vocabulary in counts],
        "insertions": _summed([vocabulary.insertions for vocabulary in counts]),
        "hits": _summed([vocabulary.hits for vocabulary in counts]),
        "snapshot_bytes": [len(snapshot) for snapshot in run.snapshots if snapshot is not None],
    }
    if with_steps:
        result["step_ms"] = [1e3 * (s.schedule + s.forward + s.sample + s.commit + s.draft) for s in steps]
        result["retrieval_ms"] = [1e3 * step.vocabulary for step in steps]
    return result


def _summed(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {key: sum(part.get(key, 0) for part in parts) for key in sorted({key for part in parts for key in part})}
