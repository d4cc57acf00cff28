"""Requests of tenants who do no harm, and what becomes of them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.attack.server import MODEL, VICTIM, Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FOUR_TOKENS = {"model": MODEL, "prompt": "Hello there", "max_tokens": 4, "temperature": 0}
_PAUSE = 0.3


@dataclass(frozen=True)
class Answer:
    """What became of a request after ``seconds``. Status 0: no answer came; ``body`` then says why."""

    status: int
    seconds: float
    body: Any

    @property
    def is_served(self) -> bool:
        return self.status == 200


def ask(server: Server, tenant: str, body: Mapping[str, Any], path: str = COMPLETIONS, timeout: float = 120) -> Answer:
    """POST ``body`` with the key of ``tenant`` and read the whole answer."""
    headers = {"Authorization": f"Bearer {server.keys[tenant]}", "Content-Type": "application/json"}
    start = time.perf_counter()
    connection = http.client.HTTPConnection(*server.address, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        status, content = response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        status, content = 0, repr(error)
    finally:
        connection.close()
    return Answer(status, time.perf_counter() - start, content)


def with_schema(body: Mapping[str, Any], schema: object) -> dict[str, Any]:
    """``body`` with ``schema`` as its response format."""
    json_schema = {"name": "attack", "schema": schema}
    return {**body, "response_format": {"type": "json_schema", "json_schema": json_schema}}


@dataclass
class Victim:
    """A tenant that sends the same request again and again as long as the block lasts, and keeps the answers.

    ``until`` (``time.monotonic``): no answer is waited for longer, so that the block ends in bounded time.
    """

    server: Server
    until: float
    tenant: str = VICTIM
    body: Mapping[str, Any] = field(default_factory=lambda: FOUR_TOKENS)
    path: str = COMPLETIONS
    answers: list[Answer] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Victim:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_PAUSE):
            timeout = max(1.0, self.until - time.monotonic())
            self.answers.append(ask(self.server, self.tenant, self.body, self.path, timeout))

    def figures(self) -> dict[str, float]:
        """How many were asked and not served, and the longest answer in seconds, unserved ones included."""
        return {
            "victim_longest_seconds": max((answer.seconds for answer in self.answers), default=float("nan")),
            "victim_requests": len(self.answers),
            "victim_unserved": sum(not answer.is_served for answer in self.answers),
        }
