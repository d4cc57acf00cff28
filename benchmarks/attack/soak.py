"""All attacks mixed on one server, while two tenants send requests whose right answers are known."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path

from benchmarks.attack import compiling, grammar_fuzz, large_bodies, masks, starving, tokenize_flood
from benchmarks.attack.bars import at_most, exactly
from benchmarks.attack.clients import CHAT, ask, with_schema
from benchmarks.attack.determinism import Answer, read_answer
from benchmarks.attack.forge_channel import MODES, channel_options, forge
from benchmarks.attack.http_fuzz import Exchange
from benchmarks.attack.keyless import endless_bodies, slow_bodies
from benchmarks.attack.random_schemas import RandomSchemas
from benchmarks.attack.server import ATTACKER, MODEL, OTHER, VICTIM, Server, serving
from benchmarks.attack.varied_requests import Request, varied_requests

_QUESTIONS = 32
_ATTACKERS = 3
_CHECKPOINT_SECONDS = 60.0
_MOVE_SECONDS = (5.0, 20.0)
_PAUSE_SECONDS = 1.0
_TIMEOUT = 60.0
BARS = {
    "wrong": exactly(0),
    "unserved": exactly(0),
    "engine_restarts": exactly(0),
    "api_mb_grown": at_most(100),
    "engine_mb_grown": at_most(100),
}

Move = Callable[[Server, float, random.Random], None]
"""Attacks a server for at most some seconds, in a way drawn at random."""


def _masks(server: Server, seconds: float, chance: random.Random) -> None:
    schema = chance.choice(chance.choice(list(masks.SCHEMAS.values())))
    ask(server, ATTACKER, with_schema(masks.BODY, schema), timeout=seconds)


def _compiling(server: Server, seconds: float, chance: random.Random) -> None:
    ask(server, ATTACKER, with_schema(compiling.BODY, chance.choice(compiling.SLOW)), CHAT, seconds)


def _starving(server: Server, seconds: float, chance: random.Random) -> None:
    with starving.open_stream(server, ATTACKER, chance.choice((starving.LONG, starving.MANY))):
        time.sleep(seconds)


def _keyless(server: Server, seconds: float, chance: random.Random) -> None:
    with endless_bodies(server, 1) if chance.random() < 0.5 else slow_bodies(server, 50):
        time.sleep(seconds)


def _tokenizing(server: Server, seconds: float, chance: random.Random) -> None:
    body = {"model": MODEL, "prompt": chance.choice(list(tokenize_flood.TEXTS.values()))}
    encoded = json.dumps(body, ensure_ascii=False).encode()
    tokenize_flood.flood(server, tokenize_flood.TOKENIZE, encoded, tokenize_flood.AT_ONCE, seconds)


def _large_bodies(server: Server, seconds: float, chance: random.Random) -> None:
    path, body = chance.choice(list(large_bodies.bodies().values()))
    tokenize_flood.flood(server, path, body.encode(), large_bodies.AT_ONCE, seconds)


def _grammars(server: Server, seconds: float, chance: random.Random) -> None:
    schemas, end = RandomSchemas(chance.getrandbits(32)), time.monotonic() + seconds
    while time.monotonic() < end:
        ask(server, ATTACKER, with_schema(grammar_fuzz.BODY, schemas.next()), timeout=seconds)


def _http(server: Server, seconds: float, chance: random.Random) -> None:
    Exchange(server, chance.getrandbits(32)).run(seconds)


MOVES: Mapping[str, Move] = {
    "masks": _masks,
    "compiling": _compiling,
    "starving": _starving,
    "keyless": _keyless,
    "tokenizing": _tokenizing,
    "large_bodies": _large_bodies,
    "grammars": _grammars,
    "http": _http,
}


def run(source: Path, minutes: float, seed: int, checkpoints: Path) -> dict[str, float]:
    """A JSON line a minute goes to ``checkpoints``; the figures are those of all minutes together."""
    with tempfile.TemporaryDirectory(prefix="evospec-attack-") as directory, ExitStack() as stack:
        channel, options = channel_options(Path(directory))
        server = stack.enter_context(serving(source, "soak", "--kv-max-bytes", str(starving.KV_BYTES), *options))
        questions = varied_requests(seed, _QUESTIONS)
        expected = [_answer(server, VICTIM, question) for question in questions]
        if any(isinstance(answer, str) for answer in expected):
            raise RuntimeError(f"not every request is served by a server that nobody attacks: {expected}")
        moves = {**MOVES, "channel": lambda server, seconds, chance: forge(channel, chance.choice(list(MODES)))}
        events, stopping = list[str](), threading.Event()
        work = [partial(_behave, server, tenant, questions, expected, events) for tenant in (VICTIM, OTHER)]
        work += [partial(_misbehave, server, moves, random.Random(seed + n), events) for n in range(_ATTACKERS)]
        with ThreadPoolExecutor(len(work)) as pool:
            clients = [pool.submit(one, stopping) for one in work]
            try:
                lines = _watch(server, events, minutes, checkpoints)
            finally:
                stopping.set()
            for client in clients:
                client.result()  # raises what ended it
    return _summary(lines, Counter(events))


def _behave(
    server: Server,
    tenant: str,
    questions: Sequence[Request],
    expected: Sequence[Answer | str],
    events: list[str],
    stopping: threading.Event,
) -> None:
    """One question after the other, each answer compared with the known one."""
    for question, known in cycle(zip(questions, expected, strict=True)):
        if stopping.wait(_PAUSE_SECONDS):
            return
        answer = _answer(server, tenant, question)
        if isinstance(answer, str):
            events += ["unserved", f"unserved: {answer}"]
        else:
            events.append("served" if answer == known else "wrong")


def _misbehave(
    server: Server, moves: Mapping[str, Move], chance: random.Random, events: list[str], stopping: threading.Event
) -> None:
    while not stopping.wait(_PAUSE_SECONDS):
        name = chance.choice(list(moves))
        try:
            moves[name](server, chance.uniform(*_MOVE_SECONDS), chance)
        except OSError as error:  # the server ended it, which is what it should do
            events.append(f"attacks ended: {name}, {type(error).__name__}")
        events.append(f"attacks: {name}")


def _answer(server: Server, tenant: str, question: Request) -> Answer | str:
    """What must always be the same, or why there is none."""
    path, body = question
    answer = ask(server, tenant, body, path, _TIMEOUT)
    return read_answer(answer.body) if answer.is_served else f"{answer.status} {answer.body}"[:200]


def _watch(server: Server, events: list[str], minutes: float, checkpoints: Path) -> list[dict[str, float]]:
    lines = []
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with checkpoints.open("w") as file:
        while time.monotonic() - start < 60 * minutes:
            time.sleep(min(_CHECKPOINT_SECONDS, 60 * minutes))
            line = {
                "minute": round((time.monotonic() - start) / 60, 1),
                "descriptors": server.num_descriptors(),
                **{f"{role}_mb": round(size, 1) for role, size in server.memory_mb().items()},
                "engine_restarts": server.metric("evospec:process_restarts_total", process="engine"),
            }
            lines.append(line)
            file.write(json.dumps({**line, **Counter(events)}) + "\n")
            file.flush()
    return lines


def _summary(lines: Sequence[Mapping[str, float]], counts: Counter[str]) -> dict[str, float]:
    """Counts, and what each process grew from the second quarter's greatest size to the last's."""
    count = len(lines)
    second, last = lines[count // 4 : max(1, count // 2)], lines[3 * count // 4 :]
    figures: dict[str, float] = {name: counts[name] for name in ("served", "wrong", "unserved")}
    for role in (name.removesuffix("_mb") for name in lines[-1] if name.endswith("_mb")):
        early, late, most = (max(line.get(f"{role}_mb", 0.0) for line in part) for part in (second, last, lines))
        figures |= {f"{role}_mb_grown": late - early, f"{role}_mb_most": most}
    return figures | {"engine_restarts": lines[-1]["engine_restarts"], "descriptors": lines[-1]["descriptors"]}
