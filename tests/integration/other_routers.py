"""vLLM's and SGLang's routers in front of two replicas: where pip has installed them, which are 160 MB,

python -m pytest tests/integration/other_routers.py
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.messages import EngineOutput, EngineRequest
from engine.models.config import ModelFiles
from engine.text.tokenizer import Tokenizer
from tests.integration.running_api import TEXT
from tests.integration.running_fleet import RouterCommand, running_fleet

RunFleet = Callable[..., Any]


def vllm_router(port: int, replicas: Sequence[int], _: Path) -> list[str]:
    return [_program("vllm-router"), "--policy", "consistent_hash", *_options(port, replicas)]


def sglang_router(port: int, replicas: Sequence[int], _: Path) -> list[str]:
    return [_program("sglang-router"), "launch", "--policy", "manual", *_options(port, replicas)]


def _options(port: int, replicas: Sequence[int]) -> list[str]:
    health = ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    urls = [f"http://127.0.0.1:{replica}" for replica in replicas]
    return [*health, "--port", str(port), "--prometheus-port", str(port + 1), "--worker-urls", *urls]


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def two_tokens(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300])
    yield EngineOutput(request_id=request.request_id, token_ids=[301], finish_reason="stop")


ROUTERS = pytest.mark.parametrize(
    ("router", "header"), [(vllm_router, "x-session-id"), (sglang_router, "x-smg-routing-key")], ids=["vllm", "sglang"]
)


@pytest.fixture
def fleet(tiny_model: ModelFiles, tokenizer: Tokenizer, valkey_url: str, tmp_path: Path) -> RunFleet:
    """``async with fleet(script, router) as running``."""
    return lambda script, router: running_fleet(script, tiny_model, tokenizer, valkey_url, tmp_path, router)


@ROUTERS
async def test_sessions_stay_and_answers_stream(fleet: RunFleet, router: RouterCommand, header: str) -> None:
    async with fleet(two_tokens, router) as running:
        await running.until_status(200)
        replicas = [{await running.replica_of({header: f"session {i}"}) for _ in range(3)} for i in range(16)]
        assert all(len(of_one) == 1 for of_one in replicas)
        assert set.union(*replicas) == {0, 1}
        answer = await running.client.post("/v1/completions", json={**TEXT, "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")
        assert (await running.client.post("/v1/completions", json={**TEXT, "top_p": 5})).status_code == 400


@ROUTERS
async def test_a_replica_that_is_about_to_end_is_asked_no_more(
    fleet: RunFleet, router: RouterCommand, header: str
) -> None:
    async with fleet(two_tokens, router) as running:
        await running.until_status(200)
        replica = await running.replica_of({header: "session"})
        running.replicas[replica].app.state.leaving = True
        async with asyncio.timeout(20):
            while await running.replica_of({header: "session"}) == replica:
                pass  # it answers meanwhile
