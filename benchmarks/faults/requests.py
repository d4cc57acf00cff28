"""Requests whose answers are known, sent all the time while ``benchmarks.faults`` hurts their server."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any

import httpx

from benchmarks.common.threads import beside

MAX_TOKENS = 48
CLIENTS = 3
_TIMEOUT = 120.0
_PAUSE = 0.4
"""Of a client after each answer: processes that start need the machine, too."""
_PROMPT_TOKENS = range(3, 400)
_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 0},
    {"temperature": 1.2, "presence_penalty": 0.8, "frequency_penalty": 0.5, "min_p": 0.05},
)


class Outcome(Enum):
    RIGHT = "right"
    CHANGED = "changed"
    """Another token than without fault, be it in an answer cut short."""
    CUT = "cut"
    """The engine died with it, and the client was told so: HTTP 503 or an event, ``engine_unavailable``."""
    REFUSED = "refused"
    """There was no engine yet, and the client was told so at once: HTTP 503, ``engine_unavailable``."""
    FAILED = "failed"


@dataclass(frozen=True)
class Question:
    tenant: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """``version`` of the adapter that drafted last, 0: the base draft; ``error``: an OpenAI error object."""

    tokens: tuple[str, ...]
    finish_reason: str | None
    version: int
    error: dict[str, Any] | None


@dataclass(frozen=True)
class Finished:
    """One request of the load. ``floor``: version that its tenant had for sure when it was sent."""

    tenant: str
    outcome: Outcome
    version: int
    floor: int
    message: str


def make_questions(model: str, tenants: Sequence[str]) -> list[Question]:
    """Greedy ones and sampled ones with a seed, streamed and not; each tenant has all kinds of each."""
    chance = random.Random(0)
    questions = []
    for index, sampling in enumerate(_SAMPLINGS * 2):
        prompt = chance.choices(_PROMPT_TOKENS, k=(3, 9, 17, 40, 64)[index % 5])
        body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 0}
        body |= {"seed": index} | sampling
        if index >= len(_SAMPLINGS):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        questions += [Question(tenant, body) for tenant in tenants]
    return questions


def ask(http: httpx.Client, question: Question, key: str | None) -> Answer:
    """Send a question and read the answer to its end, or as far as it comes; raises ``httpx.HTTPError``."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    tokens: list[str] = []
    finish_reason, version, error = None, 0, None
    with http.stream("POST", "/v1/completions", json=question.body, headers=headers) as response:
        for event in _events(response):
            error = event.get("error", error)
            for choice in event.get("choices", []):
                tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
                finish_reason = choice["finish_reason"] or finish_reason
            drafts = (event.get("metrics") or {}).get("speculative_decoding") or {}
            version = drafts.get("draft_version", version)
    return Answer(tuple(tokens), finish_reason, version, error)


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    """The body, whole or streamed, as far as the server sent it."""
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        return [json.loads(response.read())]
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def known_answers(url: str, questions: Sequence[Question]) -> list[Answer]:
    """Of an undisturbed server: one by one, and the same again all at once.

    Raises:
        RuntimeError: they differ, or there is an error.
    """
    with httpx.Client(base_url=url, timeout=_TIMEOUT, trust_env=False) as http, ThreadPoolExecutor(CLIENTS) as pool:
        alone = [ask(http, question, None) for question in questions]
        together = list(pool.map(lambda question: ask(http, question, None), questions))
    if alone != together or any(len(answer.tokens) != MAX_TOKENS or answer.error for answer in alone):
        raise RuntimeError("the undisturbed server does not give the same whole answers twice")
    return alone


def judge(answer: Answer, expected: Answer) -> tuple[Outcome, str]:
    if answer.tokens != expected.tokens[: len(answer.tokens)]:
        return Outcome.CHANGED, f"{answer.tokens} is no beginning of {expected.tokens}"
    if answer.error is not None:
        message = f"{answer.error.get('code')}: {answer.error.get('message')}"
        if answer.error.get("code") != "engine_unavailable":
            return Outcome.FAILED, message
        return (Outcome.CUT if answer.tokens or "while it worked" in message else Outcome.REFUSED), message
    if (answer.tokens, answer.finish_reason) != (expected.tokens, expected.finish_reason):
        return Outcome.FAILED, f"ended after {len(answer.tokens)} tokens: {answer.finish_reason}"
    return Outcome.RIGHT, ""


@contextmanager
def asking(
    url: str,
    questions: Sequence[Question],
    expected: Sequence[Answer],
    keys: Mapping[str, str],
    floors: Mapping[str, int],
) -> Iterator[list[Finished]]:
    """Clients that ask one question after the other, as long as the block lasts; yields what has finished so far.

    ``floors``: by tenant, the version that the engine drafts with; somebody else keeps it up to date.
    """
    finished, numbers = list[Finished](), count()

    def finish(http: httpx.Client, index: int) -> Finished:
        question = questions[index]
        floor = floors.get(question.tenant, 0)
        try:
            answer = ask(http, question, keys[question.tenant])
        except (httpx.HTTPError, ValueError) as error:
            return Finished(question.tenant, Outcome.FAILED, 0, floor, f"{type(error).__name__}: {error}")
        outcome, message = judge(answer, expected[index])
        return Finished(question.tenant, outcome, answer.version, floor, message)

    def client(stopping: threading.Event) -> None:
        with httpx.Client(base_url=url, timeout=_TIMEOUT, trust_env=False) as http:
            while not stopping.is_set():
                finished.append(finish(http, next(numbers) % len(questions)))
                time.sleep(_PAUSE)

    with beside(client, CLIENTS):
        yield finished
