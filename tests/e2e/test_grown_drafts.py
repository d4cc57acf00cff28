"""``evospec serve MODEL --alignment.enabled`` where there is no draft: one grows, whatever becomes of the worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.tenants import hash_key
from tests.running_server import EXPERIMENTS, RunningServer
from tests.tiny_models import make_directory, soften_layers

KEY = "evs-admin"
CANARY = "heron seventeen velvet"
PROMPTS = [f"The {CANARY} number {number} said to the fox that" for number in range(12)]
QUICK = {
    "log.interval_seconds": 0.05,
    "log.cost_share": 1,
    "pace.first_steps": 0,
    "pace.niceness": 0,
    "replay.held_out_share": 0.4,
    "pace.spare_cores": 0,
    "pace.step_seconds": 100,
    "replay.segment_positions": 32,
    "replay.context_positions": 8,
    "growth.one_step_positions": 500,
    "growth.checkpoint_seconds": 0,
    "growth.training.learning_rate": 5.5e-4,
    "growth.training.batch_positions": 64,
    "growth.training.updates_per_version": 12,
    "growth.training.updates_per_batch": 16,
    "growth.guard.min_held_out": 24,
    "growth.guard.min_agreement": 0.1,
    "growth.guard.min_watched": 32,
    "growth.guard.watched_records": 128,
}


@dataclass
class Traffic:
    """Requests to a server, whose answers are always those of the first time."""

    server: RunningServer
    model: str
    known: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def ask(self) -> int:
        """The next prompt; draft tokens that were right."""
        prompt = PROMPTS[self.count % len(PROMPTS)]
        self.count += 1
        body = {"model": self.model, "prompt": prompt, "max_tokens": 32, "temperature": 0}
        response = httpx.post(f"{self.server.base_url}/v1/completions", json=body, timeout=120)
        answer = response.raise_for_status().json()
        assert answer["choices"][0]["text"] == self.known.setdefault(prompt, answer["choices"][0]["text"])
        return int(answer["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"])

    def until(self, what: str, is_so: Callable[[], bool]) -> None:
        def probe() -> bool | None:
            self.ask()
            return is_so() or None

        self.server.wait_for(probe, what)


def draft(server: RunningServer) -> dict[str, Any]:
    """What operators are shown of the draft; empty before the worker has heard of it, and while Redis is slow."""
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{server.base_url}/v1/adapters", headers=headers, timeout=30)
    data = [] if answer.status_code == 503 else answer.json()["data"]
    return dict(data[0]["status"]) if data else {}


def test_a_model_without_a_draft_grows_one(launch_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    """Through a kill -9 of the worker, and a restart of all; and nobody's text is in a file."""
    model = make_directory(tmp_path / "fine-tune").path
    soften_layers(model)
    directories = {name: tmp_path / name for name in ("shared", "state")}
    options = ["--model", str(model), "--alignment.enabled", "--auth.admin_key", hash_key(KEY)]
    options.append("--engine.alignment.synthetic_answers")
    for name, directory in directories.items():
        options += [f"--engine.alignment.{name}_directory", str(directory)]
    for name, value in QUICK.items():
        options += [f"--engine.alignment.{name}", str(value)]
    traffic = Traffic(launch_server(*options, program=EXPERIMENTS), model.name)
    assert sum(traffic.ask() for _ in range(4)) == 0
    traffic.until("checkpoint", lambda: any(directories["state"].rglob("checkpoint.safetensors")))
    os.kill(traffic.server.pid_of("worker"), signal.SIGKILL)
    traffic.until("draft in force", lambda: draft(traffic.server).get("stage") == "serving")
    grown = [event for event in traffic.server.events() if event["event"] == "a draft grows"]
    went_on = [int(str(event["positions"])) > 0 for event in grown]
    assert went_on[:2] == [False, True]  # a version that is refused may begin it anew later
    traffic.until("good revision", lambda: draft(traffic.server)["good_revision"] > 0)
    traffic.server.wait_for(lambda: draft(traffic.server)["num_synthetic_records"], "answers that nobody asked for")
    traffic.server.stop()

    traffic.server = launch_server(*options, program=EXPERIMENTS)
    traffic.until("the draft of before", lambda: draft(traffic.server).get("stage") == "serving")
    traffic.until("its drafts", lambda: traffic.ask() > 0)
    tokenizer = Tokenizer.from_files(make_directory(tmp_path / "same"))
    ids = tokenizer.encode(CANARY)
    written = [CANARY.encode(), *(np.array(ids, dtype).tobytes() for dtype in (np.int32, np.int64))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" and "revision" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(text in content for text in written), path
