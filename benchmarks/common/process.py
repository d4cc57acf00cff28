"""Starting, watching and stopping the servers under test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

LOGS = Path.home() / ".cache" / "evospec" / "bench-logs"
START_TIMEOUT = 420.0
STOP_TIMEOUT = 20.0
QUIET_PERCENT = 5.0
_ROLES = {"evospec.engine.process": "engine", "grammar_process": "grammar", "adapters.": "worker", "valkey": "valkey"}


@dataclass(frozen=True)
class Launch:
    """How to start a server: what is run, where (default: here), and what the results record."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None


class ServerFailed(Exception):
    """A server did not start; the message ends with the last lines of its log."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(launch_at: Callable[[int], Launch], name: str) -> Iterator[tuple[str, psutil.Process]]:
    """Runs a server on a free port until the block ends; yields its URL and process once ``/health`` answers 200.

    It gets a session of its own, so that all its processes are stopped with it. Its log has the name ``name``.
    """
    port, log = free_port(), LOGS / f"{name}.log"
    launch = launch_at(port)
    log.parent.mkdir(parents=True, exist_ok=True)
    # By default SIGTERM ends this process without unwinding, and the server would go on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with log.open("w") as output:
        process = subprocess.Popen(
            launch.command,
            env=os.environ | launch.environment,
            cwd=launch.directory,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ServerFailed(f"{process.args!r} did not become healthy; end of {log}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, then SIGKILL to whatever is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT)
    for group in _groups_of_session(process.pid):
        os.killpg(group, signal.SIGKILL)
    process.wait(STOP_TIMEOUT)


def _groups_of_session(session: int) -> set[int]:
    groups = set()
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session:
                groups.add(os.getpgid(pid))
        except ProcessLookupError:
            continue
    return groups


def fetch(url: str, key: str | None = None, method: str = "GET", timeout: float = 10) -> str:
    """The body of an answer; ``key``: of the tenant that asks. Raises ``OSError``."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text: str = answer.read().decode()
    return text


def metrics(url: str, key: str | None = None, timeout: float = 10) -> list[Sample]:
    """All samples of a server's ``/metrics``; ``key``: of the tenant that may read it."""
    families = text_string_to_metric_families(fetch(f"{url}/metrics", key, timeout=timeout))
    return [sample for family in families for sample in family.samples]


def tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def memory(process: psutil.Process) -> dict[str, int]:
    """Bytes of a server's processes by role, "api" for the launcher; what several share counts once in all."""
    sizes: Counter[str] = Counter()
    for member in tree(process):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(member.cmdline())
            role = next((name for word, name in _ROLES.items() if word in command), "api")
            sizes[role] += member.memory_full_info().pss
    return sizes


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of the process and its living descendants so far."""
    total = 0.0
    for member in tree(process):
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def wait_for_quiet(seconds: float) -> None:
    """Returns after two seconds with under 5 % of the machine in use, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        quiet = quiet + 1 if psutil.cpu_percent(interval=1.0) < QUIET_PERCENT else 0


class NoiseMeter:
    """Share of the machine that processes other than this one and the servers used, in percent of all cores."""

    def __init__(self, *servers: psutil.Process) -> None:
        self._servers = servers
        self._start = time.perf_counter()
        self._busy = self._busy_seconds()
        self._own = self._own_seconds()

    def _busy_seconds(self) -> float:
        times = psutil.cpu_times()
        return float(times.user + times.nice + times.system + times.irq + times.softirq)

    def _own_seconds(self) -> float:
        return time.process_time() + sum(map(cpu_seconds, self._servers))

    def read(self) -> float:
        others = (self._busy_seconds() - self._busy) - (self._own_seconds() - self._own)
        available = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        return max(0.0, 100.0 * others / available)
