"""vLLM's, SGLang's and LiteLLM's routers in front of two replicas: where pip has installed them, which are large,

python -m pytest tests/integration/other_routers.py
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from tests.integration.running_api import TEXT
from tests.integration.running_fleet import RouterCommand, running_fleet
from tests.integration.scripted_engine import Script

RunFleet = Callable[..., Any]
_LITELLM = Path(__file__).parents[2] / "deploy" / "litellm.yaml"


def vllm_router(port: int, replicas: Sequence[int], _: Path) -> list[str]:
    return [_program("vllm-router"), "--policy", "consistent_hash", *_options(port, replicas)]


def sglang_router(port: int, replicas: Sequence[int], _: Path) -> list[str]:
    return [_program("sglang-router"), "launch", "--policy", "manual", *_options(port, replicas)]


def litellm(port: int, replicas: Sequence[int], directory: Path) -> list[str]:
    """With deploy/litellm.yaml, for these replicas, the tests' model, and clients without a key."""
    configuration = yaml.safe_load(_LITELLM.read_text())
    configuration["general_settings"]["dangerously_permit_weak_or_unset_master_key"] = True
    for place, replica in zip(configuration["model_list"], replicas, strict=True):
        url = f"http://127.0.0.1:{replica}/v1"
        place["model_name"] = TEXT["model"]
        place["litellm_params"] |= {"model": f"hosted_vllm/{TEXT['model']}", "api_base": url}
    path = directory / "litellm.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return [_program("litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]


def _options(port: int, replicas: Sequence[int]) -> list[str]:
    health = ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    urls = [f"http://127.0.0.1:{replica}" for replica in replicas]
    return [*health, "--port", str(port), "--prometheus-port", str(port + 1), "--worker-urls", *urls]


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def two_tokens(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300])
    yield EngineOutput(request_id=request.request_id, token_ids=[301], finish_reason="stop")


def nothing(request: EngineRequest) -> Iterable[EngineOutput]:
    return ()


ASKS_HEALTH = [
    pytest.param(vllm_router, "x-session-id", id="vllm"),
    pytest.param(sglang_router, "x-smg-routing-key", id="sglang"),
]
"""Those that ask for /health: LiteLLM's proxy finds out by failures."""


@pytest.fixture
def fleet(tiny_model: ModelFiles, tokenizer: Tokenizer, valkey_url: str, tmp_path: Path) -> RunFleet:
    """``async with fleet(script, router) as running``."""

    def run(script: Script, router: RouterCommand) -> Any:
        health = "/health/readiness" if router is litellm else "/health"  # its /health asks the models
        return running_fleet(script, tiny_model, tokenizer, valkey_url, tmp_path, router, health)

    return run


@pytest.mark.parametrize(("router", "header"), [*ASKS_HEALTH, pytest.param(litellm, "x-session-id", id="litellm")])
async def test_sessions_stay_and_answers_stream(fleet: RunFleet, router: RouterCommand, header: str) -> None:
    async with fleet(two_tokens, router) as running:
        await running.until_status(200)
        replicas = [{await running.replica_of({header: f"session-{i}"}) for _ in range(3)} for i in range(16)]
        assert all(len(of_one) == 1 for of_one in replicas)
        assert set.union(*replicas) == {0, 1}
        answer = await running.client.post("/v1/completions", json={**TEXT, "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")
        assert (await running.client.post("/v1/completions", json={**TEXT, "top_p": 5})).status_code == 400


@pytest.mark.parametrize(("router", "header"), ASKS_HEALTH)
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


async def test_litellm_asks_another_replica_before_the_first_byte_and_passes_the_session_on(fleet: RunFleet) -> None:
    async with fleet(nothing, litellm) as running:
        request = asyncio.create_task(running.complete({"x-session-id": "session-0"}))
        asked, other = await running.asked()
        asked.cut_off()
        await other.until(lambda: other.engine.requests)
        await other.engine.send(*two_tokens(other.engine.requests[0]))
        assert (await request).status_code == 200
        assert other.engine.requests[0].session is not None
