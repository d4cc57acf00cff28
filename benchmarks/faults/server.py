"""The server that ``benchmarks.faults`` hurts, with a worker that learns, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.process import Launch, fetch, metrics, running, tree
from benchmarks.faults.model import FaultModel
from evospec.engine.adapters_config import (
    AdaptersConfig,
    GuardConfig,
    PaceConfig,
    ReplayConfig,
    TokenLogConfig,
    TrainingConfig,
)
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.weight_channel import WeightChannel
from evospec.engine.online.weight_layout import WeightLayout
from evospec.server.tenants import hash_key, new_key

TENANTS = ("law", "clinic", "school", "shop")
_SCRAPER = "prometheus"
"""The tenant that may read metrics, and nothing else."""
ENGINE, WORKER, VALKEY = "evospec.engine.process", "evospec.adapters.alignment.worker", "valkey-server"
RING_ROWS = 256
_PROCESSES = {ENGINE: "engine", WORKER: "worker", VALKEY: "valkey"}
_POLL_SECONDS = 0.2
_STAYS_SECONDS = 0.75
"""What the server shows of a dead engine is gone sooner."""
UNKNOWN = (OSError, SharedMemoryError, KeyError)
"""What asking a server for its state may raise while there is a fault."""


class LauncherEnded(Exception):
    """``evospec serve`` has ended, which no fault asks it to: somebody stopped it, or it has crashed."""


def worker_options(directory: Path, shared: Path) -> AdaptersConfig:
    """A worker that is quick to learn and to judge, and works all the time: faults are to find it at work."""
    return AdaptersConfig(
        enabled=True,
        rank=32,
        num_slots=len(TENANTS),
        shared_directory=shared,
        state_directory=directory / "state",
        log=TokenLogConfig(top_k=8, sample_share=0.5, ring_rows=RING_ROWS),
        training=TrainingConfig(learning_rate=3e-3, updates_per_version=8),
        replay=ReplayConfig(segment_positions=40, context_positions=8),
        guard=GuardConfig(min_held_out=48, min_watched=32, watched_records=64),
        pace=PaceConfig(step_seconds=10.0, spare_cores=0.0),
    )


@dataclass(frozen=True)
class State:
    """All of it at about one time. ``in_engine`` and ``in_channel``: versions by adapter key."""

    worker: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Any]]
    in_engine: Mapping[str, int]
    in_channel: Mapping[str, int]
    failed_loads: float
    records_written: float

    @property
    def disagreement(self) -> str:
        """What keeps this from being a server at work, everybody of one mind about the versions; "": nothing."""
        if not self.worker.get("is_attached") or self.worker["lag"] is None:
            return f"the worker is not at work: {self.worker}"
        reported = {key: one["channel_version"] for key, one in self.adapters.items() if one["slot"] is not None}
        if not self.in_engine == self.in_channel == reported:
            return f"engine {self.in_engine}, channel {self.in_channel}, worker {reported}"
        return ""


@dataclass
class Server:
    """A running server and its launcher; ``keys``: API key by tenant, ``layout``: of its weight channel."""

    url: str
    process: psutil.Process
    model: FaultModel
    layout: WeightLayout
    keys: Mapping[str, str]
    admin: str
    """The admin key."""
    scraper: str
    """The key for metrics."""
    num_killed: Counter[str] = field(default_factory=Counter)
    """How often each process was killed."""

    def child(self, module: str) -> psutil.Process:
        """The engine, the worker or Valkey; raises RuntimeError while it is not there."""
        for process in tree(self.process):
            try:
                if any(module in word for word in process.cmdline()):
                    return process
            except psutil.Error:
                continue
        raise RuntimeError(f"there is no {_PROCESSES[module]} process")

    def kill(self, module: str) -> None:
        self.child(module).kill()
        self.num_killed[module] += 1

    def channel(self) -> WeightChannel:
        """The weight channel as another process finds it; raises ``SharedMemoryError``."""
        return WeightChannel.attach(self.model.options.channel_path, self.layout)

    def state(self) -> State:
        """Raises one of ``UNKNOWN`` where something cannot be asked."""
        status = json.loads(fetch(f"{self.url}/v1/adapters", self.admin))
        channel = self.channel()
        slots = channel.slots()
        channel.close()
        samples = metrics(self.url, self.scraper)
        values = {sample.name: sample.value for sample in samples}
        return State(
            worker=status["worker"] or {},
            adapters={one["key"]: one["status"] for one in status["data"]},
            in_engine={
                sample.labels["key"]: int(sample.value)
                for sample in samples
                if sample.name == "evospec:alignment_draft_version"
            },
            in_channel={slot.key: slot.version for slot in slots if slot.key is not None},
            failed_loads=values["evospec:alignment_failed_loads_total"],
            records_written=values["evospec:alignment_records_written_total"],
        )

    def wait(self, is_so: Callable[[State], str], seconds: float) -> float:
        """Until ``is_so`` has nothing to say against it and it stays so.

        Returns:
            since when (``time.monotonic``).

        Raises:
            TimeoutError: with what it says.
            LauncherEnded: nobody is there to wait for.
        """
        deadline, problem, since = time.monotonic() + seconds, "", None
        while time.monotonic() < deadline:
            if self.process.status() == psutil.STATUS_ZOMBIE:
                raise LauncherEnded
            try:
                fetch(f"{self.url}/health")
                problem = is_so(self.state())
            except UNKNOWN as error:
                problem = f"{type(error).__name__}: {error}"
            since = None if problem else since or time.monotonic()
            if since is not None and time.monotonic() - since > _STAYS_SECONDS:
                return since
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(problem)


def _running(
    model: FaultModel, name: str, options: Mapping[str, object], flags: Sequence[str] = ()
) -> AbstractContextManager[tuple[str, psutil.Process]]:
    common = {
        "model": model.target,
        "engine.model.dtype": "float32",
        "engine.runtime.attention_backend": "torch",
        "engine.runtime.threads": 1,
        "engine.cache.num_blocks": 512,
    }
    words = [part for name, value in (common | dict(options)).items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.common.experiments", "serve", *words, *flags]
    return running(lambda port: Launch([*command, "--port", str(port)]), f"faults-{name}")


@contextmanager
def undisturbed(model: FaultModel) -> Iterator[str]:
    """A server without drafts, for the answers; yields its URL."""
    with _running(model, "undisturbed", {"engine.speculation.method": "none"}) as (url, _):
        yield url


@contextmanager
def serving(model: FaultModel, name: str) -> Iterator[Server]:
    """A server that aligns, until the block ends; it goes on with what one before it has learned."""
    admin = secrets.token_urlsafe(16)
    keys, scraper = {tenant: new_key() for tenant in TENANTS}, new_key()
    options = {
        "engine.speculation.method": "eagle3",
        "engine.speculation.draft": model.draft,
        "engine.speculation.vocabulary": "full",
        "auth.keys": ",".join(f"{tenant}={hash_key(key)}" for tenant, key in (keys | {_SCRAPER: scraper}).items()),
        "auth.metrics_tenant": _SCRAPER,
        "auth.admin_key": hash_key(admin),
        "engine.alignment": model.options.model_dump_json(),
    }
    with _running(model, name, options, ["--no-engine.speculation.adaptive"]) as (url, process):
        yield Server(url, process, model, model.layout(), keys, admin, scraper)


def shared_directory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
