"""Two replicas behind a real Envoy with the configuration of deploy/envoy, and engines that follow scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.fleet.envoy import envoy_command
from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from tests.integration.running_api import TEXT
from tests.integration.running_fleet import is_healthy, running_fleet
from tests.integration.scripted_engine import Script
from tests.proxy import Proxy

RunFleet = Callable[[Script], Any]
SESSION = {"x-session-id": "one"}


@pytest.fixture
def fleet(tiny_model: ModelFiles, tokenizer: Tokenizer, valkey_url: str, tmp_path: Path) -> RunFleet:
    """``async with fleet(script) as running``."""
    return lambda script: running_fleet(script, tiny_model, tokenizer, valkey_url, tmp_path, envoy_command)


def one_token(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300], finish_reason="stop")


def nothing(request: EngineRequest) -> Iterable[EngineOutput]:
    return ()


def first_token(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300])


async def test_what_belongs_together_comes_to_one_replica(fleet: RunFleet) -> None:
    async with fleet(one_token) as running:
        for header in ("x-session-id", "session-id", "x-session-affinity", "authorization", "x-api-key"):
            replicas = [{await running.replica_of({header: f"name {i}"}) for _ in range(3)} for i in range(16)]
            assert all(len(of_one) == 1 for of_one in replicas)
            assert set.union(*replicas) == {0, 1}


async def test_a_replica_that_dies_before_the_first_byte_costs_nothing(fleet: RunFleet) -> None:
    async with fleet(nothing) as running:
        request = asyncio.create_task(running.complete(SESSION))
        asked, other = await running.asked()
        asked.cut_off()
        await other.until(lambda: other.engine.requests)
        await other.engine.send(*one_token(other.engine.requests[0]))
        assert (await request).status_code == 200
        assert len(asked.engine.requests) == len(other.engine.requests) == 1


async def test_what_has_begun_is_never_sent_again(fleet: RunFleet) -> None:
    async with fleet(first_token) as running:
        async with running.client.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
            chunks = response.aiter_raw()
            assert (await anext(chunks)).startswith(b"data: ")  # nothing waits for the end
            asked, other = await running.asked()
            asked.cut_off()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(chunks)
        assert not other.engine.requests


async def test_every_sessions_refusal_goes_to_another_replica(fleet: RunFleet) -> None:
    """The next places of the ring may all be the same replica's, as five are for one session in 32."""
    async with fleet(one_token) as running:
        running.replicas[0].app.state.draining = True
        sessions = [{"x-session-id": f"name {i}"} for i in range(400)]
        assert {await running.replica_of(session) for session in sessions} == {1}


async def test_a_refusal_goes_to_another_replica(fleet: RunFleet) -> None:
    async with fleet(one_token) as running:
        replica = await running.replica_of(SESSION)
        running.replicas[replica].app.state.draining = True
        assert await running.replica_of(SESSION) != replica
        large = TEXT | {"prompt": "x" * 3_000_000}
        answer = await running.client.post("/v1/completions", json=large, headers=SESSION)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_replica_that_is_about_to_end_is_asked_no_more(fleet: RunFleet) -> None:
    async with fleet(one_token) as running:
        for replica in running.replicas:
            replica.app.state.leaving = True
        refused = await running.until_status(503)
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        assert not await is_healthy(running.client)
        running.replicas[0].app.state.leaving = False
        await running.until_status(200)
        assert await running.replica_of() == 0


async def test_a_silent_replica_is_asked_no_more_and_may_answer_late(
    tiny_model: ModelFiles, tokenizer: Tokenizer, valkey_url: str, tmp_path: Path
) -> None:
    networks = [Proxy(0), Proxy(0)]

    def envoy(port: int, replicas: Sequence[int], directory: Path) -> list[str]:
        for network, replica in zip(networks, replicas, strict=True):
            network.server = replica
        return envoy_command(port, [network.port for network in networks], directory)

    async with (
        networks[0].running(),
        networks[1].running(),
        running_fleet(one_token, tiny_model, tokenizer, valkey_url, tmp_path, envoy) as running,
    ):
        silent = await running.replica_of(SESSION)
        networks[silent].cut()
        late = asyncio.create_task(running.complete(SESSION))
        other = running.replicas[1 - silent]
        while not other.engine.requests:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await running.complete(SESSION)
        networks[silent].mend()
        assert (await late).status_code == 200


async def test_metrics_are_the_replicas_own(fleet: RunFleet) -> None:
    async with fleet(one_token) as running:
        assert (await running.client.get("/metrics")).status_code == 404
