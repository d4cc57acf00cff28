"""A running EvoSpec server as its tenants and its operator see it: answers, what the worker does, memory."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import psutil

from benchmarks.adapt.sides import Side, arguments
from benchmarks.common.client import Speculation, stream
from benchmarks.common.drafting import Drafting
from benchmarks.common.load import LoadOptions
from benchmarks.common.process import LOGS, Launch, free_port, running, tree
from benchmarks.prompts.build import Prompt
from engine.online.adapter_control import AdapterStatus, adapter_key
from server.tenants import hash_key, new_key

ENGINE, WORKER = "engine.process", "adapters.alignment.worker"
_SETTLE_SECONDS = 60.0
_POLL_SECONDS = 0.25
_SEGMENT_SECONDS = 6.0
"""A request silent for so long is over for the worker."""


@dataclass(frozen=True)
class Answer:
    """One request. ``at``: its start, seconds of ``time.monotonic``; ``first``: seconds to its first token; ``steps``
    verified drafts, of which ``accepted`` tokens were right; ``version`` of the adapter, 0: the base draft."""

    tenant: str
    domain: str
    prompt: str
    at: float
    seconds: float
    first: float
    tokens: int
    steps: int
    accepted: int
    version: int


class Server:
    """One side, serving.

    Args:
        side: which.
        url: base URL.
        model: the target's name.
        keys: API key by tenant.
        admin: the admin key.
        process: the launcher.
    """

    def __init__(
        self, side: Side, url: str, model: str, keys: dict[str, str], admin: str, process: psutil.Process
    ) -> None:
        self.side, self.url, self.process = side, url, process
        self._model, self._keys, self._admin = model, keys, admin

    async def ask(self, prompt: Prompt, tenant: str, max_tokens: int) -> Answer:
        """A greedy answer, to its natural end; a tenant's requests are one session where sessions are followed."""
        body = {
            "model": self._model,
            "messages": prompt.messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "user": tenant,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        at = time.monotonic()
        result = await stream(f"{self.url}/v1/chat/completions", body, api_key=self._keys[tenant])
        if result.error is not None:
            raise RuntimeError(f"{self.side.name}: {prompt.id}: {result.error}")
        drafts = result.speculation or Speculation()
        return Answer(
            tenant=tenant,
            domain=prompt.domain,
            prompt=prompt.id,
            at=at,
            seconds=result.end - result.start,
            first=(result.token_times or [result.end])[0] - result.start,
            tokens=result.completion_tokens,
            steps=drafts.num_spec_steps,
            accepted=drafts.num_accepted_draft_tokens,
            version=drafts.draft_version,
        )

    def load_options(self, tenant: str, concurrency: int, num_requests: int, max_tokens: int) -> LoadOptions:
        """For ``run_load``."""
        return replace(
            LoadOptions(self.url, self._model, concurrency, num_requests, max_tokens), api_key=self._keys[tenant]
        )

    def status(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Of the worker (empty before its first report), and of each adapter key."""
        answer = self._call("GET", "/v1/adapters")
        return answer["worker"] or {}, {one["key"]: one["status"] for one in answer["data"]}

    def adapter(self, tenant: str) -> dict[str, Any]:
        """What the worker says of a tenant's adapter."""
        return self.status()[1].get(self._key(tenant), msgspec.structs.asdict(AdapterStatus()))

    async def freeze(self, tenants: Iterable[str]) -> None:
        """Let the worker read what was logged, and learn no more: not from requests to come either."""
        await self._wait(lambda: self.status()[0].get("lag") == 0)
        for tenant in tenants:
            self._command(tenant, "freeze")
        await self._wait(lambda: all(self.adapter(tenant)["is_frozen"] for tenant in tenants))

    async def unfreeze(self, tenants: Iterable[str]) -> None:
        """Let it learn again, once it has forgotten the requests since."""
        await self._wait(lambda: self.status()[0].get("lag") == 0)
        await asyncio.sleep(_SEGMENT_SECONDS)
        for tenant in tenants:
            self._command(tenant, "unfreeze")
        await self._wait(lambda: not any(self.adapter(tenant)["is_frozen"] for tenant in tenants))

    def child(self, module: str) -> psutil.Process | None:
        """The engine's process, or the worker's."""
        return next((process for process in tree(self.process) if module in _command_line(process)), None)

    def _key(self, tenant: str) -> str:
        return adapter_key(self.side.key_scope, tenant, None)

    def _command(self, tenant: str, action: str) -> None:
        self._call("POST", f"/v1/adapters/{quote(self._key(tenant), safe='')}/{action}")

    async def _wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not is_so():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.side.name}: the worker did not get there; it reports {self.status()}")
            await asyncio.sleep(_POLL_SECONDS)

    def _call(self, method: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self._admin}"}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


def _command_line(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


def forget_peak(process: psutil.Process) -> None:
    """Let the peak of its memory begin at what it has now."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes resident now, and at most since the start or ``forget_peak``."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


@contextmanager
def serving(side: Side, model: str, drafting: Drafting, tenants: Sequence[str]) -> Iterator[Server]:
    """Runs a side's server until the block ends; it has learned nothing yet.

    Args:
        side: which.
        model: the target.
        drafting: what drafts.
        tenants: names; each gets a key.
    """
    port, admin = free_port(), secrets.token_urlsafe(16)
    keys = {tenant: new_key() for tenant in tenants}
    tmpfs = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="evospec-adapt-") as directory,
        tempfile.TemporaryDirectory(prefix="evospec-adapt-", dir=tmpfs) as shared,
    ):
        pairs = ",".join(f"{tenant}={hash_key(key)}" for tenant, key in keys.items())
        own = ["--port", str(port), "--auth.keys", pairs, "--auth.admin_key", hash_key(admin)]
        program = "benchmarks.adapt.full_parameters" if side.trains_all_weights else "benchmarks.common.experiments"
        command = [sys.executable, "-m", program, "serve", *own]
        command += arguments(side, model, drafting, Path(directory), Path(shared))
        log = LOGS / f"adapt-{model}-{side.name.replace('/', '-')}.log"
        with running(Launch(command), port, log) as process:
            yield Server(side, f"http://127.0.0.1:{port}", model, keys, admin, process)
