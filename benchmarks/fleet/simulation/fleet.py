"""Sessions that talk with many replicas through a router, and what comes of it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from benchmarks.fleet.simulation.machine import Machine
from benchmarks.fleet.simulation.replica import Costs, Replica, Step
from benchmarks.fleet.simulation.ring import Router
from benchmarks.fleet.simulation.traces import Conversation, Scale
from evospec.engine.request import Request


@dataclass
class Served:
    """A turn as its client saw it; times in seconds from the start of the run."""

    session: str
    turn: int
    start: float
    prompt_tokens: int
    output_tokens: int
    replica: int = -1
    first_token: float = 0.0
    end: float = 0.0
    stayed: bool = False
    """Whether it was at the replica of the turn before."""
    cached_tokens: int = 0
    events: int = 0
    """Parts in which the answer came."""

    @property
    def name(self) -> str:
        return f"{self.session}/{self.turn}"

    @property
    def accepted(self) -> float:
        """Share of the answer that was drafted."""
        return 1 - self.events / self.output_tokens

    def overlaps(self, other: Served) -> bool:
        """Whether another turn was there while this one waited for its first token."""
        return other.start < self.first_token and self.start < other.end


_TOKENS_BITS = 14
"""Of a conversation's length."""


_Work = Callable[[float], None]
"""What happens at a time, which it is told."""


@dataclass(eq=False)
class _Host:
    """A replica, and what waits outside of its engine."""

    replica: Replica
    machine: int
    front: deque[tuple[float, _Work]] = field(default_factory=deque)
    step: Step | None = None


class Fleet:
    """Replicas with ``num_blocks`` of KV cache each.

    ``machines``: the number of each replica's machine, which has ``cores``. ``accepted``: as ``Replica`` has it.
    """

    def __init__(
        self,
        costs: Costs,
        num_blocks: int,
        router: Router,
        machines: Sequence[int],
        cores: float,
        scale: Scale,
        accepted: Mapping[str, float],
    ) -> None:
        self._costs, self._router, self._scale = costs, router, scale
        self.machines = [Machine(cores - costs.idle * machines.count(number)) for number in range(max(machines) + 1)]
        self.hosts = [_Host(Replica(costs, num_blocks, seed, accepted), one) for seed, one in enumerate(machines)]
        self._active = [0] * len(machines)
        self._last: dict[str, int] = {}
        self._said: dict[Request, list[int]] = {}
        self._asked: dict[Request, tuple[Conversation, Served]] = {}
        self._events: list[tuple[float, int, _Work]] = []
        self._order = count()
        self._version = [0] * len(self.machines)
        self.served: list[Served] = []

    def run(self, conversations: Iterable[Conversation], tenants: Sequence[str]) -> list[Served]:
        """All turns, in the order in which they end; conversations are dealt out to ``tenants``."""
        self._tenants = tenants
        for one in conversations:
            self._at(one.start, partial(self._ask, one, 0, self._scale.shared))
        while self._events:
            now, _, work = heapq.heappop(self._events)
            work(now)
        return self.served

    def _at(self, time: float, work: _Work) -> None:
        heapq.heappush(self._events, (time, next(self._order), work))

    def _ask(self, conversation: Conversation, turn: int, length: int, now: float) -> None:
        """A turn of a conversation that has ``length`` tokens so far."""
        one = conversation.turns[turn]
        served = Served(conversation.name, turn, now, length + one.new, one.output)
        served.replica = self._router.choose(conversation.name, self._active)
        served.stayed = self._last.get(conversation.name) == served.replica
        self._last[conversation.name] = served.replica
        self._active[served.replica] += 1
        self._queue_front(now, served.replica, self._costs.request, partial(self._arrive, conversation, served))

    def _arrive(self, conversation: Conversation, served: Served, now: float) -> None:
        number = conversation.number
        replica = self.hosts[served.replica].replica
        tokens = self._tokens(number, served.prompt_tokens + served.output_tokens)
        tenant = self._tenants[number % len(self._tenants)]
        request = replica.add(served.name, tenant, tokens[: served.prompt_tokens], served.output_tokens)
        self._asked[request] = conversation, served
        self._said[request] = tokens[served.prompt_tokens :]
        self._begin_step(served.replica, now)

    def _tokens(self, number: int, length: int) -> list[int]:
        """The first tokens of a conversation, answers included: its own, after those with which all begin."""
        own = (1 + number) << _TOKENS_BITS
        return [place if place < self._scale.shared else (own + place) % 2**31 for place in range(length)]

    def _begin_step(self, number: int, now: float) -> None:
        host = self.hosts[number]
        if host.step is None and (step := host.replica.begin()) is not None:
            host.step = step
            self._start(now, number, step.seconds, is_engine=True)

    def _end_step(self, number: int, now: float) -> None:
        host, step = self.hosts[number], self.hosts[number].step
        assert step is not None
        host.step = None
        events = host.replica.end(step, self._said)
        if events:
            self._queue_front(now, number, self._costs.event * len(events), partial(self._deliver, events))
        self._begin_step(number, now)

    def _deliver(self, events: list[tuple[Request, bool]], now: float) -> None:
        """Tokens have reached their clients."""
        for request, is_over in events:
            conversation, served = self._asked[request]
            served.first_token = served.first_token or now
            served.events += 1
            if is_over:
                served.end, served.cached_tokens = now, request.num_cached_tokens
                self.served.append(served)
                self._active[served.replica] -= 1
                del self._asked[request], self._said[request]
                self._queue_front(now, served.replica, self._costs.closing, lambda now: None)
                self._go_on(conversation, served, now)

    def _go_on(self, conversation: Conversation, served: Served, now: float) -> None:
        turn, length = served.turn + 1, served.prompt_tokens + served.output_tokens
        if turn < len(conversation.turns):
            self._at(now + conversation.turns[turn].pause, partial(self._ask, conversation, turn, length))
        else:
            self._last.pop(conversation.name, None)

    def _queue_front(self, now: float, number: int, seconds: float, work: _Work) -> None:
        """What API server, router, Redis and client have to do for a replica: one thing after the other."""
        front = self.hosts[number].front
        front.append((seconds, work))
        if len(front) == 1:
            self._start(now, number, seconds, is_engine=False)

    def _start(self, now: float, number: int, seconds: float, is_engine: bool) -> None:
        machine = self.hosts[number].machine
        self.machines[machine].start(now, number, seconds, is_engine)
        self._watch(machine)

    def _watch(self, machine: int) -> None:
        """Look again when its next task ends, unless another begins or ends before."""
        self._version[machine] += 1
        if (found := self.machines[machine].next_end()) is not None:
            time, task, is_engine = found
            self._at(time, partial(self._finish, machine, self._version[machine], task, is_engine))

    def _finish(self, machine: int, version: int, number: Any, is_engine: bool, now: float) -> None:
        if version != self._version[machine]:
            return
        self.machines[machine].end(now, number, is_engine)
        self._watch(machine)
        if is_engine:
            self._end_step(number, now)
            return
        front = self.hosts[number].front
        _, work = front.popleft()
        if front:
            self._start(now, number, front[0][0], is_engine=False)
        work(now)
