"""Requests of tenants who do no harm, and what becomes of them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.attack.server import MODEL, VICTIM, Server
from benchmarks.common.threads import beside

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


def post(server: Server, tenant: str, content: str | bytes, path: str, timeout: float) -> tuple[int, bytes]:
    """POST with the key of ``tenant``; status and body of the answer. Raises ``OSError`` or ``HTTPException``."""
    headers = {"Authorization": f"Bearer {server.keys[tenant]}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(*server.address, timeout=timeout)
    try:
        connection.request("POST", path, content, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask(server: Server, tenant: str, body: Mapping[str, Any], path: str = COMPLETIONS, timeout: float = 120) -> Answer:
    """POST ``body`` with the key of ``tenant`` and read the whole answer."""
    start = time.perf_counter()
    try:
        status, content = post(server, tenant, json.dumps(body), path, timeout)
        answer = json.loads(content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        status, answer = 0, repr(error)
    return Answer(status, time.perf_counter() - start, answer)


def with_schema(body: Mapping[str, Any], schema: object) -> dict[str, Any]:
    json_schema = {"name": "attack", "schema": schema}
    return {**body, "response_format": {"type": "json_schema", "json_schema": json_schema}}


@contextmanager
def victim(
    server: Server, until: float, body: Mapping[str, Any] = FOUR_TOKENS, path: str = COMPLETIONS
) -> Iterator[list[Answer]]:
    """A tenant that sends the same request again and again as long as the block lasts; yields its answers.

    ``until`` (``time.monotonic``): no answer is waited for longer, so that the block ends in bounded time.
    """
    answers: list[Answer] = []

    def send(stopping: threading.Event) -> None:
        while not stopping.wait(_PAUSE):
            answers.append(ask(server, VICTIM, body, path, max(1.0, until - time.monotonic())))

    with beside(send):
        yield answers


def victim_figures(answers: Sequence[Answer]) -> dict[str, float]:
    """How many were asked and not served, and the longest answer in seconds, unserved ones included."""
    return {
        "victim_longest_seconds": max((answer.seconds for answer in answers), default=float("nan")),
        "victim_requests": len(answers),
        "victim_unserved": sum(not answer.is_served for answer in answers),
    }
