"""A real Prometheus that scrapes a server with this project's own configuration and rules."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from benchmarks.dashboards import Prometheus

CONFIGURATION = Path(__file__).parents[1] / "deploy" / "prometheus"
BINARY = shutil.which("prometheus")


@contextmanager
def running_prometheus(urls: Sequence[str], port: int, directory: Path, key: str | None = None) -> Iterator[Prometheus]:
    """It scrapes and evaluates every half second, so that seconds of load are enough for every rate.

    It finds the servers at ``urls`` by a file, where the configuration itself asks the name server of a network.
    """
    assert BINARY is not None
    configuration = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    configuration["rule_files"] = [str(CONFIGURATION / "rules.yml")]
    scrape = configuration["scrape_configs"][0]
    if key is not None:
        scrape["authorization"] = {"credentials": key}
    del scrape["dns_sd_configs"]
    scrape["file_sd_configs"] = [{"files": [str(directory / "servers.json")]}]
    targets = [{"targets": [url.removeprefix("http://") for url in urls]}]
    (directory / "servers.json").write_text(json.dumps(targets))
    (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{port}"
    arguments = [
        BINARY,
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "log").open("wb") as log, subprocess.Popen(arguments, stderr=log) as process:
        try:
            _wait_until_ready(url, process, directory / "log")
            yield Prometheus(url)
        finally:
            process.terminate()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"Prometheus did not start:\n{log.read_text()}")
