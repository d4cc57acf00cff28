"""The server that ``benchmarks.faults`` hurts, with a worker that learns, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.process import LOGS, Launch, free_port, running, tree
from benchmarks.faults.model import FaultModel
from engine.adapters_config import AdaptersConfig, GuardConfig, PaceConfig, ReplayConfig, TokenLogConfig, TrainingConfig
from engine.online.shared_file import SharedMemoryError
from engine.online.weight_channel import WeightChannel
from engine.online.weight_layout import WeightLayout
from server.tenants import hash_key, new_key

TENANTS = ("law", "clinic", "school", "shop")
_SCRAPER = "prometheus"
"""The tenant that may read metrics, and nothing else."""
ENGINE, WORKER, VALKEY = "engine.process", "adapters.alignment.worker", "valkey-server"
RING_ROWS = 256
_PROCESSES = {ENGINE: "engine", WORKER: "worker", VALKEY: "valkey"}
_POLL_SECONDS = 0.2
_STAYS_SECONDS = 0.75
"""What the server shows of a dead engine is gone sooner."""
UNKNOWN = (OSError, SharedMemoryError, KeyError, IndexError)
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


class Server:
    """A running server.

    Args:
        url: base URL.
        process: the launcher.
        model: what it serves.
        layout: of its weight channel.
        keys: API key by tenant.
        admin: the admin key.
        scraper: the key for metrics.
    """

    def __init__(
        self,
        url: str,
        process: psutil.Process,
        model: FaultModel,
        layout: WeightLayout,
        keys: Mapping[str, str],
        admin: str,
        scraper: str,
    ) -> None:
        self.url, self.process, self.model, self.layout, self.keys = url, process, model, layout, keys
        self._admin, self._scraper = admin, scraper
        self.num_killed: Counter[str] = Counter()
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
        """SIGKILL."""
        self.child(module).kill()
        self.num_killed[module] += 1

    def channel(self) -> WeightChannel:
        """The weight channel as another process finds it; raises ``SharedMemoryError``."""
        return WeightChannel.attach(self.model.options.channel_path, self.layout)

    def state(self) -> State:
        """Raises one of ``UNKNOWN`` where something cannot be asked."""
        status = json.loads(self._get("/v1/adapters", self._admin))
        channel = self.channel()
        slots = channel.slots()
        channel.close()
        metrics = self._metrics()
        return State(
            worker=status["worker"] or {},
            adapters={one["key"]: one["status"] for one in status["data"]},
            in_engine={
                labels["key"]: int(value) for labels, value in metrics.get("evospec:alignment_draft_version", [])
            },
            in_channel={slot.key: slot.version for slot in slots if slot.key is not None},
            failed_loads=metrics["evospec:alignment_failed_loads_total"][0][1],
            records_written=metrics["evospec:alignment_records_written_total"][0][1],
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
                self._get("/health", None)
                problem = is_so(self.state())
            except UNKNOWN as error:
                problem = f"{type(error).__name__}: {error}"
            since = None if problem else since or time.monotonic()
            if since is not None and time.monotonic() - since > _STAYS_SECONDS:
                return since
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(problem)

    def _metrics(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        text = self._get("/metrics", self._scraper)
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found

    def _get(self, path: str, key: str | None) -> str:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=10) as answer:
            text: str = answer.read().decode()
        return text


def _command(model: FaultModel, port: int, options: Mapping[str, object], flags: list[str]) -> list[str]:
    common = {
        "port": port,
        "model": model.target,
        "engine.model.dtype": "float32",
        "engine.runtime.attention_backend": "torch",
        "engine.runtime.threads": 1,
        "engine.cache.num_blocks": 512,
    }
    words = [part for name, value in (common | dict(options)).items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "benchmarks.common.experiments", "serve", *words, *flags]


@contextmanager
def undisturbed(model: FaultModel) -> Iterator[str]:
    """A server without drafts, for the answers; yields its URL."""
    port = free_port()
    launch = Launch(_command(model, port, {"engine.speculation.method": "none"}, []))
    with running(launch, port, LOGS / "faults-undisturbed.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serving(model: FaultModel, name: str) -> Iterator[Server]:
    """A server that aligns, until the block ends; it goes on with what one before it has learned."""
    port, admin = free_port(), secrets.token_urlsafe(16)
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
    launch = Launch(_command(model, port, options, ["--no-engine.speculation.adaptive"]))
    with running(launch, port, LOGS / f"faults-{name}.log") as process:
        yield Server(f"http://127.0.0.1:{port}", process, model, model.layout(), keys, admin, scraper)


def shared_directory() -> str | None:
    """Where shared memory is best."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
