"""A model on several ranks, each a process: texts are those of one process, and a rank that dies is not the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from evospec.engine.config import EngineConfig, ModelConfig, RuntimeConfig
from evospec.engine.models.config import ModelError
from evospec.engine.validation import validated_files
from tests.exactness import SETTINGS
from tests.running_server import AT_ONCE, SMALL, RunningServer
from tests.sharded_texts import Texts, requests
from tests.tiny_drafts import Engine, make_draft_directory
from tests.tiny_families import FAMILIES
from tests.tiny_models import make_directory


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_texts_are_those_of_one_process(num_ranks: int, tmp_path: Path) -> None:
    """In float32, of a vocabulary that ranks cannot share evenly."""
    files = FAMILIES["gemma3"].make(tmp_path / "target", num_key_value_heads=4, vocab_size=510)
    draft, result = make_draft_directory(tmp_path / "draft", files), tmp_path / "texts.json"
    program = [sys.executable, "-m", "tests.sharded_texts"]
    subprocess.run([*program, str(num_ranks), files.path, draft, result], check=True)
    texts = msgspec.json.decode(result.read_bytes(), type=Texts)
    expected = Engine(files, SETTINGS["alone"]).generate_alone(*requests())
    assert texts.outputs == [*expected, expected[-1]]
    assert min(texts.num_accepted, texts.num_cached, texts.num_preemptions) > 0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


@pytest.fixture
def server(log: Path, tmp_path: Path) -> Iterator[RunningServer]:
    model = make_directory(tmp_path / "tiny", max_position_embeddings=8192).path
    options = [str(model), "--tensor-parallel-size", "2", "--engine.runtime.device", "cpu", *SMALL, *AT_ONCE]
    server = RunningServer(log, options)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.stop()


def stream(server: RunningServer, max_tokens: int) -> Iterator[dict[str, Any]]:
    """Events of a completion."""
    body = {"model": "tiny", "prompt": "the", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    url = f"{server.base_url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def answer(server: RunningServer) -> str:
    return "".join(event["choices"][0]["text"] for event in stream(server, 8))


def pid_of_rank(server: RunningServer) -> int:
    """Of the newest."""
    return [int(str(event["pid"])) for event in server.events() if event["event"] == "rank started"][-1]


def test_a_rank_that_is_killed_ends_the_engine_which_is_started_again(server: RunningServer, log: Path) -> None:
    """What is asked gets the error of an engine that died; the log says why in one line; another group answers."""
    before, killed = answer(server), pid_of_rank(server)
    events = stream(server, 8000)
    next(events)
    os.kill(killed, signal.SIGKILL)
    assert [event["error"]["code"] for event in events if "error" in event] == ["engine_unavailable"]
    server.wait_for(lambda: pid_of_rank(server) != killed or None, "another rank")
    server.wait_until_healthy()
    assert answer(server) == before
    errors = [event for event in server.events() if event["level"] in ("error", "critical")]
    names = ["a rank has died, and the engine ends with it", "engine lost", "process died"]
    assert sorted(str(event["event"]) for event in errors) == names
    assert next(event["pid"] for event in errors if event["event"] == names[0]) == killed
    assert "Traceback" not in log.read_text()
    os.kill(server.pid_of("engine"), signal.SIGKILL)
    server.wait_for(lambda: is_gone(pid_of_rank(server)) or None, "end of the rank of an engine that was killed")


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked how."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def test_what_cannot_be_shared_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    model = ModelConfig(name=str(make_directory(tmp_path / "tiny").path))
    validated_files(EngineConfig(model=model, runtime=RuntimeConfig(tensor_parallel_size=2)))
    with pytest.raises(ModelError, match=r"tensor_parallel_size is 4, .* num_kv_heads \(2\) cannot be divided"):
        validated_files(EngineConfig(model=model, runtime=RuntimeConfig(tensor_parallel_size=4)))
    with pytest.raises(ValueError, match="attention_backend native, which is for one process"):
        RuntimeConfig(tensor_parallel_size=2, attention_backend="native")
