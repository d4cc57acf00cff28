"""A whole server under load, scraped by a real Prometheus: no panel of a dashboard may be empty."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx
import pytest

from deploy.grafana.build import DIRECTORY
from deploy.grafana.queries import Prometheus, query_panels
from server.tenants import hash_key
from tests.running_prometheus import BINARY, running_prometheus
from tests.running_server import RunningServer

TENANTS = {"acme": "secret-a", "beta": "secret-b"}
RATE_INTERVAL = "5s"
WAIT_SECONDS = 120.0


@contextmanager
def load(base_url: str) -> Iterator[None]:
    """Three clients of each tenant, until the end of the block."""
    stop = Event()

    def client(key: str) -> None:
        body = {"model": "smollm2-135m", "prompt": "The three primary colours are", "max_tokens": 24}
        headers = {"Authorization": f"Bearer {key}"}
        while not stop.is_set():
            httpx.post(f"{base_url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, key) for key in TENANTS.values() for _ in range(3)]
        try:
            yield
        finally:
            stop.set()
        for future in clients:
            future.result()


def empty_queries(prometheus: Prometheus) -> list[str]:
    """Queries of all dashboards without a number in their newest seconds."""
    now = time.time()
    empty = []
    for path in sorted(DIRECTORY.glob("*.json")):
        for panel in query_panels(json.loads(path.read_text())):
            for target in panel["targets"]:
                series = prometheus.panel({"targets": [target]}, now - 3, now, RATE_INTERVAL)
                if all(math.isnan(value) for each in series for value in each.values):
                    empty.append(f"{path.stem}: {panel['title']}: {target['expr']}")
    return empty


@pytest.mark.skipif(
    BINARY is None and "CI" not in os.environ, reason="prometheus is not installed (Debian package prometheus)"
)
def test_no_panel_is_empty_under_load(
    launch_server: Callable[..., RunningServer], smollm2_path: Path, free_port: int, tmp_path: Path
) -> None:
    # The model drafts for itself: whatever drafts ship, something is proposed and accepted. Two sequences at a time
    # make the others queue.
    options = {
        "auth.keys": ",".join(f"{tenant}={hash_key(key)}" for tenant, key in TENANTS.items()),
        "engine.model.max_model_len": "1024",
        "engine.scheduler.max_num_seqs": "2",
        "engine.speculation.method": "draft_model",
        "engine.speculation.draft": str(smollm2_path),
    }
    arguments = [word for option, value in options.items() for word in (f"--{option}", value)]
    server = launch_server(*arguments, "--no-engine.speculation.adaptive")
    with (
        running_prometheus(server.base_url, TENANTS["acme"], free_port, tmp_path) as prometheus,
        load(server.base_url),
    ):
        deadline = time.monotonic() + WAIT_SECONDS
        while (empty := empty_queries(prometheus)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert empty == []
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}
        assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
        tenants = prometheus.get("query", query="sum by (tenant) (evospec:spec_decode_num_drafts_total)")["result"]
        assert {each["metric"]["tenant"] for each in tenants} == set(TENANTS)
