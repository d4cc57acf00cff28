"""The servers that are attacked: real ones of their own, on free loopback ports, with keys for each tenant."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.common.process import LOGS, Launch, memory, metrics, running
from evospec.server.tenants import hash_key, new_key

MODEL = "smollm2-135m"
ATTACKER, VICTIM, OTHER, METRICS = "acme", "bravo", "charlie", "prometheus"
LIMITED = ("limited-1", "limited-2", "limited-3")
REQUESTS_PER_MINUTE = 10
"""What each of ``LIMITED`` may send."""


@dataclass(frozen=True)
class Server:
    """A running server: its base URL, its launcher, a key for each tenant, and where its log is."""

    url: str
    process: psutil.Process
    keys: dict[str, str]
    log_path: Path

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples called ``name`` that have these labels, 0 if there are none."""
        samples = (sample for sample in metrics(self.url, self.keys[METRICS], timeout=120) if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def memory_mb(self) -> dict[str, float]:
        """Megabytes of its processes by role; what several processes share counts once (proportional set size)."""
        return {name: size / 1e6 for name, size in memory(self.process).items()}

    def api_mb(self) -> float:
        """Resident megabytes of the process that serves HTTP."""
        return float(self.process.memory_info().rss / 1e6)

    def num_descriptors(self) -> int:
        """Open files and sockets of the process that serves HTTP."""
        return int(self.process.num_fds())

    def tracebacks(self) -> int:
        return self.log_path.read_text(errors="replace").count("Traceback (most recent call last)")


@contextmanager
def serving(source: Path, name: str, *options: str) -> Iterator[Server]:
    """The server of the checkout ``source`` until the block ends; its log is called after ``name``."""
    log = f"attack-{name}-{source.name}"
    with tempfile.TemporaryDirectory(prefix="evospec-attack-") as directory:
        keys_file = Path(directory) / "keys.toml"
        keys = write_keys(keys_file)
        common = ["--model", MODEL, "--keys-file", str(keys_file), "--log.format", "json"]
        # The console script would import the checkout that is installed.
        command = [sys.executable, "-c", "from evospec.server.cli import main; main()", "serve", *common, *options]
        environment = {"PYTHONPATH": str(source), "PYTHONUNBUFFERED": "1"}
        with running(lambda port: Launch([*command, "--port", str(port)], environment, source), log) as (url, process):
            yield Server(url, process, keys, LOGS / f"{log}.log")


def write_keys(path: Path) -> dict[str, str]:
    """A keys file of all tenants; returns a key for each."""
    keys = {tenant: new_key() for tenant in (ATTACKER, VICTIM, OTHER, METRICS, *LIMITED)}
    lines = []
    for tenant, key in keys.items():
        lines += [f"[tenants.{tenant}]", f'keys = ["{hash_key(key)}"]']
        if tenant in LIMITED:
            lines.append(f"requests_per_minute = {REQUESTS_PER_MINUTE}")
    path.write_text("\n".join(lines))
    return keys
