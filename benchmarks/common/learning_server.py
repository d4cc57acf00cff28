"""A server that learns, as its clients and its operator see it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from benchmarks.common.process import Launch, fetch, running
from evospec.server.bench.stream import Speculation, stream
from evospec.server.tenants import hash_key


def verification_length(answers: Iterable[Mapping[str, Any]]) -> float:
    """Tokens for each verification of what ``LearningServer.ask`` gave; steps without drafts count."""
    counts = [(answer["tokens"], answer["accepted"]) for answer in answers]
    tokens, accepted = map(sum, zip(*counts, strict=True))
    return float(tokens / (tokens - accepted))


class LearningServer:
    """``evospec serve`` at ``url``, the name of its model, its operator's key, and a tenant's, if it has tenants."""

    def __init__(self, url: str, model: str, admin: str, key: str | None = None) -> None:
        self.url, self._model, self._admin, self._key = url, model, admin, key

    def as_tenant(self, key: str) -> LearningServer:
        """The same server for the tenant of ``key``."""
        return LearningServer(self.url, self._model, self._admin, key)

    async def ask(self, prompt: str, max_tokens: int, drafts: bool = True) -> dict[str, Any]:
        """A greedy answer; tokens, seconds, draft tokens that were right, copied ones included, and who drafted."""
        body: dict[str, Any] = {"model": self._model, "messages": [{"role": "user", "content": prompt}], "stream": True}
        body |= {"max_tokens": max_tokens, "temperature": 0, "stream_options": {"include_usage": True}}
        if not drafts:
            body["num_speculative_tokens"] = 0
        result = await stream(f"{self.url}/v1/chat/completions", body, api_key=self._key)
        if result.error is not None:
            raise RuntimeError(result.error)
        speculation = result.speculation or Speculation()
        first = (result.token_times or [result.end])[0]
        return {
            "prompt_tokens": result.prompt_tokens,
            "tokens": result.completion_tokens,
            "accepted": speculation.num_accepted_draft_tokens,
            "draft_version": speculation.draft_version,
            "seconds": result.end - result.start,
            "decoding": result.end - first,
            "text": hash(result.text),
        }

    def state(self) -> dict[str, Any]:
        """What the worker says of the draft and of itself; empty before it has heard of any traffic."""
        answer = self._call("GET", "/v1/adapters")
        return {**answer["data"][0]["status"], "worker": answer["worker"]} if answer["data"] else {}

    def freeze(self, is_frozen: bool) -> None:
        """Let the worker learn no more, or again."""
        key = self._call("GET", "/v1/adapters")["data"][0]["key"]
        self._call("POST", f"/v1/adapters/{quote(key, safe='')}/{'freeze' if is_frozen else 'unfreeze'}")
        while self.state()["is_frozen"] != is_frozen:
            time.sleep(1.0)

    @contextmanager
    def without_worker(self) -> Iterator[None]:
        """Stop the worker's process, if there is one, until the block ends."""
        pid = self.state().get("worker", {}).get("pid")
        if pid is not None:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if pid is not None:
                os.kill(pid, signal.SIGCONT)

    def _call(self, method: str, path: str) -> Any:
        return json.loads(fetch(self.url + path, self._admin, method, timeout=30))


@contextmanager
def serving(
    model: str, name: str, log: str, options: Sequence[str], program: str = "benchmarks.common.experiments"
) -> Iterator[LearningServer]:
    """Runs ``evospec serve MODEL``, which calls the model ``name``, until the block ends."""
    admin = secrets.token_urlsafe(16)
    command = [sys.executable, "-m", program, "serve", model, "--auth.admin_key", hash_key(admin), *options]
    with running(lambda port: Launch([*command, "--port", str(port)]), log) as (url, _):
        yield LearningServer(url, name, admin)
