"""A whole server as a process, for end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

T = TypeVar("T")

EVOSPEC = str(Path(sys.executable).parent / "evospec")
EXPERIMENTS = (sys.executable, "-m", "benchmarks.common.experiments")
"""The same, which knows the options that are set in code only."""
WAIT_SECONDS = 300.0
# Room for a few thousand tokens, and one thread: tests share a small machine, where threads wait for each other.
SMALL = ["--kv-max-bytes", str(256 * 1024**2), "--log.format", "json", "--engine.runtime.threads", "1"]
AT_ONCE = ["--no-engine.speculation.adaptive"]
"""A start without measuring what steps cost, for tests in which draft lengths do not matter: half the time."""


class RunningServer:
    """An ``evospec serve`` (or ``command``) of its own process; ``base_url`` has no path."""

    def __init__(
        self, log_path: Path, options: list[str], command: str = "serve", program: Sequence[str] = (EVOSPEC,)
    ) -> None:
        self._log_path = log_path
        with log_path.open("wb") as log_file:
            self.process = subprocess.Popen(
                [*program, command, *options, "--port", "0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log_file,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self.base_url = str(self.wait_for_event("listening")["url"])

    def events(self) -> list[dict[str, object]]:
        """The log so far."""
        lines = self._log_path.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def wait_for_event(self, name: str) -> dict[str, object]:
        """The first log line whose event is ``name``."""

        def find() -> dict[str, object] | None:
            return next((event for event in self.events() if event["event"] == name), None)

        return self.wait_for(find, f"log event {name!r}")

    def wait_until_healthy(self) -> None:
        """Wait for /health to be 200."""
        self.wait_for(lambda: self.health() == 200 or None, "health")

    def health(self) -> int | None:
        """Status of /health; None if nobody answers."""
        try:
            return httpx.get(f"{self.base_url}/health", timeout=5).status_code
        except httpx.TransportError:
            return None

    def pid_of(self, child: str) -> int:
        """Process id of the newest ``child`` ("engine" or "valkey")."""
        pids = [e["pid"] for e in self.events() if e["event"] == "process started" and e["process"] == child]
        return int(str(pids[-1]))

    def wait_for(self, probe: Callable[[], T | None], what: str) -> T:
        """Poll until ``probe`` returns something; fails with the server's log if it ends or takes too long."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if (result := probe()) is not None:
                return result
            if ended:
                break
            time.sleep(0.05)
        pytest.fail(f"no {what}; exit status {self.process.poll()}; log:\n{self._log_path.read_text()[-5000:]}")

    def stop(self) -> None:
        """End it, by force if SIGTERM does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail("the server did not stop after SIGTERM")
