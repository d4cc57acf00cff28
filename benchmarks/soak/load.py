"""The mixed load of ``benchmarks.soak``: requests of all kinds, good and bad."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx

from benchmarks.prompts.build import read_eval
from server.bench.load import LoadOptions, request_body
from server.bench.stream import stream

SEED = 7


class MixedLoad:
    """Requests of all kinds, chosen at random with a fixed seed; counts how each kind ended."""

    def __init__(self, url: str, model: str) -> None:
        self._options = LoadOptions(url=url, model=model, concurrency=1, num_requests=1, max_tokens=1)
        self._chance = random.Random(SEED)
        self._prompts = read_eval()
        self._http = httpx.AsyncClient(base_url=url, timeout=120)
        self._kinds = {
            self.chat: 45,
            self.completion: 20,
            self.drop: 15,
            self.several: 10,
            self.invalid: 5,
            self.tokenise: 5,
        }
        self.done: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    async def one(self) -> None:
        (kind,) = self._chance.choices(list(self._kinds), list(self._kinds.values()))
        problem = await kind()
        self.done[kind.__name__] += 1
        if problem:
            self.failures[f"{kind.__name__}: {problem}"] += 1

    def _request(self, chat: bool = True) -> tuple[str, dict[str, Any]]:
        options = replace(
            self._options,
            max_tokens=self._chance.randint(1, 96),
            temperature=self._chance.choice([0.0, 0.7, 1.0]),
            ignore_eos=self._chance.random() < 0.3,
            chat=chat,
        )
        return request_body(options, self._chance.choice(self._prompts).messages)

    async def chat(self) -> str | None:
        return (await stream(*self._request())).error

    async def completion(self) -> str | None:
        return (await stream(*self._request(chat=False))).error

    async def drop(self) -> str | None:
        result = await stream(*self._request(), drop_after=self._chance.uniform(0.01, 1.0))
        return None if result.error == "dropped by the client" else result.error

    async def several(self) -> str | None:
        """Two choices, log-probabilities, a stop string, not streamed."""
        url, body = self._request()
        del body["stream"], body["stream_options"]
        answer = await self._http.post(url, json=body | {"n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["\n\n"]})
        return None if answer.status_code == 200 and len(answer.json()["choices"]) == 2 else answer.text[:200]

    async def invalid(self) -> str | None:
        url, body = self._request()
        wrong: dict[str, Any] = self._chance.choice(
            [{"temperature": -1}, {"max_tokens": "many"}, {"messages": []}, {"top_p": 7}]
        )
        answer = await self._http.post(url, json=body | wrong)
        return None if answer.status_code == 400 else f"HTTP {answer.status_code} for {wrong}"

    async def tokenise(self) -> str | None:
        prompt = self._chance.choice(self._prompts).messages[0]["content"]
        answer = await self._http.post("/tokenize", json={"model": self._options.model, "prompt": prompt})
        return None if answer.status_code == 200 else answer.text[:200]
