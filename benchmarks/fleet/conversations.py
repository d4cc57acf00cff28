"""What the sessions of a fleet say, what they must hear, and what they heard."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from benchmarks.fleet.processes import MODEL
from benchmarks.prompts.build import read_eval
from evospec.server.bench.stream import StreamResult, stream
from evospec.server.session_ids import find_session_id, session_key

MAX_TOKENS = 24
_FOLLOW_UPS = ("Go on.", "Say the same in one sentence.", "Give an example.")
TURNS = 1 + len(_FOLLOW_UPS)
_LONGEST_PROMPT = 600
"""Characters."""
_PAUSE_SECONDS = (4.0, 12.0)
"""Least and most between an answer and the next turn."""


class Outcome(StrEnum):
    """What became of a request. ``cut`` after its first byte; ``failed``: before."""

    RIGHT = "right"
    WRONG = "wrong"
    CUT = "cut"
    FAILED = "failed"


@dataclass(frozen=True)
class Conversation:
    """A session's turns; every other one samples."""

    name: str
    question: str
    seed: int

    def body(self, answers: Sequence[str]) -> dict[str, Any]:
        """The request for the turn after ``answers``."""
        messages = [{"role": "user", "content": self.question}]
        for answer, follow_up in zip(answers, _FOLLOW_UPS, strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
        return {
            "model": MODEL,
            "messages": messages,
            "max_tokens": MAX_TOKENS,
            "temperature": 0.7 if self.seed % 2 else 0.0,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def ask(self, url: str, answers: Sequence[str], key: str) -> StreamResult:
        headers = {"x-session-id": self.name}
        return await stream(f"{url}/v1/chat/completions", self.body(answers), api_key=key, headers=headers)

    async def hold(self, url_of_turn: Callable[[int], str], key: str) -> list[StreamResult]:
        """All turns, each at the URL that it is given; raises ``RuntimeError`` if one fails."""
        results: list[StreamResult] = []
        for turn in range(TURNS):
            result = await self.ask(url_of_turn(turn), [one.text for one in results], key)
            if result.error is not None:
                raise RuntimeError(f"{self.name}, turn {turn}: {result.error}")
            results.append(result)
        return results


def make_conversations(count: int) -> list[Conversation]:
    """The first short prompts of the evaluation, as often as needed."""
    questions = [p.messages[-1]["content"] for p in read_eval() if len(p.messages[-1]["content"]) <= _LONGEST_PROMPT]
    return [Conversation(f"conversation {i}", questions[i % len(questions)], seed=i) for i in range(count)]


@dataclass(frozen=True)
class Finished:
    """A request of the traffic. ``is_lost``: its session was another one than before; ``is_saved``: with this turn."""

    outcome: Outcome
    result: StreamResult
    is_lost: bool = False
    is_saved: bool = True


class Traffic:
    """All conversations at once through ``url``, again and again in their sessions, until the task is cancelled.

    A turn that is cut or fails is asked again.
    """

    def __init__(self, url: str, conversations: Sequence[Conversation], answers: Sequence[list[str]], redis: Redis):
        self._url, self._redis = url, redis
        self._conversations = list(zip(conversations, answers, strict=True))
        self._kept: dict[str, list[bytes | str | None]] = {}
        """Incarnation and version of each session, after its last turn."""
        self.finished: list[Finished] = []

    async def run(self) -> None:
        """Never returns."""
        await asyncio.gather(*(self._converse(one, answers) for one, answers in self._conversations))

    async def _converse(self, conversation: Conversation, answers: list[str]) -> None:
        chance, turn = random.Random(conversation.seed), 0
        while True:
            await asyncio.sleep(chance.uniform(*_PAUSE_SECONDS))
            result = await conversation.ask(self._url, answers[:turn], "fleet")
            outcome = judge(result, answers[turn])
            if outcome in (Outcome.RIGHT, Outcome.WRONG):
                is_lost, is_saved = await self._look_up(conversation.name)
                self.finished.append(Finished(outcome, result, is_lost, is_saved))
                turn = (turn + 1) % TURNS
            else:
                self.finished.append(Finished(outcome, result))

    async def _look_up(self, name: str) -> tuple[bool, bool]:
        """Whether the session is lost, and whether the turn that just ended is in it."""
        session_id = find_session_id("fleet", name)
        assert session_id is not None
        try:
            found = await self._redis.hmget(session_key("fleet", MODEL, session_id), ["incarnation", "version"])
        except RedisError:
            return False, False
        before, self._kept[name] = self._kept.get(name), found
        return before is not None and before[0] != found[0], before is None or before[1] != found[1]


def judge(result: StreamResult, expected: str) -> Outcome:
    """What became of a request whose answer must be ``expected``."""
    if result.error is None:
        return Outcome.RIGHT if result.text == expected else Outcome.WRONG
    # A status, or no connection, comes instead of the first byte.
    return Outcome.FAILED if result.error.startswith(("HTTP ", "cannot connect")) else Outcome.CUT
