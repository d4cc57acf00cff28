"""Whether anything but the request changes its answer: drafts, sessions, streaming, other requests beside it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.attack.bars import exactly
from benchmarks.attack.server import ATTACKER, serving
from benchmarks.attack.varied_requests import Request, varied_requests

_PROMPTS = 220
_AT_ONCE = 16
_SESSIONS = 8
_DOMAINS = ("law", "code", "med")
BARS = {"changed": exactly(0), "status_changed": exactly(0), "unserved": exactly(0)}

Answer = tuple[Any, ...]
"""Texts, finish reasons, stop reasons and tokens of the choices, and how many tokens there were in all."""


@dataclass(frozen=True)
class Mode:
    """A way to ask all requests again. ``options`` of the nth one; ``is_shuffled`` with a seed, None: in order."""

    at_once: int = _AT_ONCE
    shuffle_seed: int | None = None
    is_streamed: bool = False
    options: Callable[[int], Mapping[str, Any]] = lambda number: {}


def run(source: Path, seeds: Sequence[int]) -> dict[str, float]:
    """All modes for each seed; every answer is compared with that of the request alone, without drafts."""
    figures = {"compared": 0.0, "changed": 0.0, "status_changed": 0.0, "unserved": 0.0}
    with serving(source, "determinism") as server:
        for seed in seeds:
            requests = varied_requests(seed, _PROMPTS)
            for name, value in asyncio.run(compare(server.url, server.keys[ATTACKER], requests)).items():
                figures[name] += value
    return figures


async def compare(url: str, key: str, requests: Sequence[Request]) -> dict[str, int]:
    """All modes, each answer compared with that of the request alone and without drafts."""
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=2 * _AT_ONCE)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False) as http:
        expected = [await _ask(http, path, {**body, "num_speculative_tokens": 0}) for path, body in requests]
        sessions = [
            (await http.post("/v1/sessions", json={"domain": _DOMAINS[number % len(_DOMAINS)]})).json()["id"]
            for number in range(_SESSIONS)
        ]
        modes = (
            Mode(at_once=1),
            Mode(shuffle_seed=5),
            Mode(shuffle_seed=6, is_streamed=True),
            Mode(shuffle_seed=7, options=lambda number: {"num_speculative_tokens": 0}),
            Mode(shuffle_seed=8, options=lambda number: {"session_id": sessions[number % _SESSIONS]}),
            Mode(
                shuffle_seed=9,
                options=lambda number: {
                    "session_id": sessions[number % _SESSIONS],
                    "num_speculative_tokens": 1 + number % 8,
                },
            ),
        )
        counts = {"compared": 0, "changed": 0, "status_changed": 0, "unserved": 0}
        counts["unserved"] = sum(status != 200 for status, _ in expected)
        for mode in modes:
            answers = await _ask_all(http, requests, mode)
            for answer, right in zip(answers, expected, strict=True):
                counts["compared"] += 1
                counts["status_changed"] += answer[0] != right[0]
                counts["changed"] += answer[0] == right[0] == 200 and answer[1] != right[1]
        return counts


async def _ask_all(http: httpx.AsyncClient, requests: Sequence[Request], mode: Mode) -> list[tuple[int, Answer]]:
    free = asyncio.Semaphore(mode.at_once)
    answers: dict[int, tuple[int, Answer]] = {}
    order = list(range(len(requests)))
    if mode.shuffle_seed is not None:
        random.Random(mode.shuffle_seed).shuffle(order)

    async def one(number: int) -> None:
        path, body = requests[number]
        send = _ask_streamed if mode.is_streamed else _ask
        async with free:
            answers[number] = await send(http, path, {**body, **mode.options(number)})

    await asyncio.gather(*map(one, order))
    return [answers[number] for number in range(len(requests))]


async def _ask(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> tuple[int, Answer]:
    response = await http.post(path, json=body)
    if response.status_code != 200:
        return response.status_code, ()
    return 200, read_answer(response.json())


def read_answer(body: Mapping[str, Any]) -> Answer:
    """What of a whole answer must always be the same."""
    choices = [
        (_text(choice), choice["finish_reason"], choice["stop_reason"], tuple(_tokens(choice)))
        for choice in body["choices"]
    ]
    return (*choices, body["usage"]["completion_tokens"])


async def _ask_streamed(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> tuple[int, Answer]:
    choices: dict[int, list[Any]] = {}
    num_tokens = None
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", path, json=streamed) as response:
        if response.status_code != 200:
            return response.status_code, ()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return 599, ()
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
            for choice in event["choices"]:
                seen = choices.setdefault(choice["index"], ["", None, None, []])
                seen[0] += _text(choice)
                seen[3] += _tokens(choice)
                if choice["finish_reason"]:
                    seen[1:3] = choice["finish_reason"], choice["stop_reason"]
    whole = [(text, finish, stop, tuple(tokens)) for _, (text, finish, stop, tokens) in sorted(choices.items())]
    return 200, (*whole, num_tokens)


def _text(choice: Mapping[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return str((choice.get("message") or choice["delta"]).get("content") or "")


def _tokens(choice: Mapping[str, Any]) -> list[str]:
    logprobs = choice.get("logprobs")
    if not logprobs:
        return []
    return [entry["token"] for entry in logprobs["content"]] if "content" in logprobs else logprobs["tokens"]
