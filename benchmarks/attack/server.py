"""The servers that are attacked: real ones of their own, on free loopback ports, with keys for each tenant."""

from __future__ import annotations

import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.process import LOGS, Launch, free_port, running, tree
from server.tenants import hash_key, new_key

MODEL = "smollm2-135m"
ATTACKER, VICTIM, OTHER, METRICS = "acme", "bravo", "charlie", "prometheus"
LIMITED = ("limited-1", "limited-2", "limited-3")
REQUESTS_PER_MINUTE = 10
"""What each of ``LIMITED`` may send."""
_ROLES = {"engine.process": "engine", "grammar_process": "grammar", "adapters.": "worker", "valkey": "valkey"}


@dataclass(frozen=True)
class Server:
    """A running server: its base URL, its launcher, a key for each tenant, and where its log is."""

    url: str
    process: psutil.Process
    keys: dict[str, str]
    log_path: Path

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples called ``name`` that have these labels, 0 if there are none."""
        headers = {"Authorization": f"Bearer {self.keys[METRICS]}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/metrics", headers=headers), timeout=120
        ) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def memory_mb(self) -> dict[str, float]:
        """Megabytes of its processes by role; what several processes share counts once (proportional set size)."""
        sizes: Counter[str] = Counter()
        for process in tree(self.process):
            with suppress(psutil.NoSuchProcess):
                sizes[role(process)] += process.memory_full_info().pss
        return {name: size / 1e6 for name, size in sizes.items()}

    def api_mb(self) -> float:
        """Resident megabytes of the process that serves HTTP."""
        return float(self.process.memory_info().rss / 1e6)

    def num_descriptors(self) -> int:
        """Open files and sockets of the process that serves HTTP."""
        return int(self.process.num_fds())

    def tracebacks(self) -> int:
        """How many tracebacks its log has."""
        return self.log_path.read_text(errors="replace").count("Traceback (most recent call last)")


def role(process: psutil.Process) -> str:
    """What a process of a server is for, from its command line; "api" for the launcher."""
    command = " ".join(process.cmdline())
    return next((name for word, name in _ROLES.items() if word in command), "api")


@contextmanager
def serving(source: Path, name: str, *options: str) -> Iterator[Server]:
    """The server of the checkout ``source`` until the block ends; its log is called after ``name``."""
    port = free_port()
    log = LOGS / f"attack-{name}-{source.name}.log"
    with tempfile.TemporaryDirectory(prefix="evospec-attack-") as directory:
        keys_file = Path(directory) / "keys.toml"
        keys = write_keys(keys_file)
        common = ["--port", str(port), "--model", MODEL, "--keys-file", str(keys_file), "--log.format", "json"]
        # The console script would import the checkout that is installed.
        command = [sys.executable, "-c", "from server.cli import main; main()", "serve", *common, *options]
        launch = Launch(command, {"PYTHONPATH": str(source), "PYTHONUNBUFFERED": "1"}, source)
        with running(launch, port, log) as process:
            yield Server(f"http://127.0.0.1:{port}", process, keys, log)


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
