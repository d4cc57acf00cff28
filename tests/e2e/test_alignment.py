"""``evospec serve``: a worker learns beside the engine once there is something to learn; its death disturbs nobody."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from evospec.server.tenants import hash_key
from tests.running_server import AT_ONCE, EXPERIMENTS, RunningServer

KEY = "evs-admin"


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    directories = {name: str(tmp_path / name) for name in ("shared", "state")}
    return [
        *AT_ONCE,
        *("--engine.alignment.pace.first_steps", "1"),
        *("--engine.alignment.pace.niceness", "1"),  # else, where the machine is busy, it starts late
        *("--engine.alignment.shared_directory", directories["shared"]),
        *("--engine.alignment.state_directory", directories["state"]),
        *("--auth.admin_key", hash_key(KEY)),
    ]


def complete(server: RunningServer) -> str:
    body = {"model": "smollm2-135m", "prompt": "The licence says", "max_tokens": 60, "temperature": 0}
    response = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def worker_pid(server: RunningServer, besides: int = 0) -> int | None:
    started = [e for e in server.events() if e["event"] == "process started" and e["process"] == "worker"]
    pids = [int(str(event["pid"])) for event in started]
    return pids[-1] if pids and pids[-1] != besides else None


def metric(server: RunningServer, name: str, **labels: str) -> float:
    text = httpx.get(f"{server.base_url}/metrics", timeout=30).text
    return next(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels.items() >= labels.items()
    )


def wait_for_worker(server: RunningServer, pid: int) -> None:
    """Until it reports that it has read records."""

    def reads() -> bool | None:
        headers = {"Authorization": f"Bearer {KEY}"}
        worker = httpx.get(f"{server.base_url}/v1/adapters", headers=headers, timeout=30).json()["worker"]
        return (worker is not None and worker["pid"] == pid and worker["is_attached"]) or None

    server.wait_for(reads, "worker")


def test_whatever_becomes_of_the_worker_disturbs_nobody(
    launch_server: Callable[..., RunningServer], options: list[str], tmp_path: Path
) -> None:
    """It dies and comes back; then it dies and cannot start again."""
    server = launch_server(*options, program=EXPERIMENTS)
    restarts = ("evospec:process_restarts_total",)
    assert worker_pid(server) is None
    text = complete(server)
    first = server.wait_for(lambda: worker_pid(server), "worker process")
    wait_for_worker(server, first)
    server.wait_for(lambda: metric(server, "evospec:alignment_worker_num_records") > 0 or None, "records read")
    assert metric(server, "evospec:alignment_records_written_total") > 0
    group = Path(f"/proc/{first}/autogroup")
    assert not group.exists() or group.read_text().endswith(" nice 1\n")
    assert os.getpriority(os.PRIO_PROCESS, first) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 1)
    os.kill(first, signal.SIGKILL)
    assert complete(server) == text
    second = server.wait_for(lambda: worker_pid(server, besides=first), "new worker process")
    assert complete(server) == text
    wait_for_worker(server, second)
    assert metric(server, *restarts, process="worker") == 1

    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("not a directory")
    os.kill(second, signal.SIGKILL)
    server.wait_for(lambda: metric(server, *restarts, process="worker") >= 3 or None, "restarts of the worker")
    assert complete(server) == text
    server.wait_for(lambda: metric(server, "evospec:alignment_worker_up") == 0 or None, "the worker to be missed")
    assert metric(server, *restarts, process="engine") == 0
