"""Rate limits and room for output, over HTTP: what is charged, and how long an answer may get that names no length."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.rate_limit import TokenBuckets
from evospec.server.tenants import hash_key
from tests.integration.running_api import Api, running_api
from tests.tiny_models import VOCAB_SIZE

PATHS = ["/v1/completions", "/v1/chat/completions"]
ServeTenant = Callable[..., AbstractAsyncContextManager[Api]]


def one_token(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300], finish_reason="stop")


@pytest.fixture
def serve_tenant(serve: Any) -> ServeTenant:
    """``serve`` for a tenant of its own, whose buckets are full."""

    @asynccontextmanager
    async def serve_one(*options: str) -> AsyncIterator[Api]:
        async with serve(one_token, "--auth.keys", f"{uuid.uuid4().hex}={hash_key('secret')}", *options) as api:
            api.client.headers["Authorization"] = "Bearer secret"
            yield api

    return serve_one


@pytest.mark.parametrize("path", PATHS)
async def test_requests_refused_after_tokenizing_count_against_the_limit(serve_tenant: ServeTenant, path: str) -> None:
    async with serve_tenant("--limits.requests_per_minute", "2") as api:
        answers = [await api.post(path, logit_bias={"-1": 1}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [400, 400, 429]


async def test_bodies_that_are_wrong_count_against_the_limit(serve_tenant: ServeTenant) -> None:
    async with serve_tenant("--limits.requests_per_minute", "3") as api:
        wrong = [await api.post(path, n="many") for path in PATHS]
        no_json = await api.client.post("/tokenize", content=b"{")
        right = await api.post(PATHS[0])
    assert [answer.status_code for answer in [*wrong, no_json, right]] == [400, 400, 400, 429]


def limits_told(response: httpx.Response, limit: str) -> list[str | None]:
    """What a response tells of the tenant's limit, what is left of it, and when it is whole again."""
    return [response.headers.get(f"x-ratelimit-{what}-{limit}") for what in ("limit", "remaining", "reset")]


@pytest.mark.parametrize("redis", [[], ["--redis.url", "unix:///nowhere/valkey.sock"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_responses_tell_what_is_left_of_the_limits(
    serve_tenant: ServeTenant, redis: list[str], stream: bool
) -> None:
    options = ["--limits.requests_per_minute", "2", "--limits.tokens_per_minute", "60000", *redis]
    async with serve_tenant(*options) as api:
        first, second, refused = [await api.post(PATHS[0], max_tokens=10, stream=stream) for _ in range(3)]
    assert [response.status_code for response in (first, second, refused)] == [200, 200, 429]
    assert limits_told(first, "requests") == ["2", "1", "30s"]
    assert limits_told(second, "requests") == ["2", "0", "1m0s"]
    assert limits_told(refused, "requests")[:2] == ["2", "0"]
    size, left, reset = limits_told(first, "tokens")
    assert size == "60000"
    assert 60000 - 64 <= int(left or 0) <= 60000 - 10
    assert reset == "1s"


async def test_a_limit_that_is_not_set_is_not_told(serve_tenant: ServeTenant) -> None:
    async with serve_tenant("--limits.tokens_per_minute", "600") as api:
        response = await api.post(PATHS[0], max_tokens=10)
    assert limits_told(response, "requests") == [None] * 3
    assert limits_told(response, "tokens")[0] == "600"


async def test_what_is_left_is_what_all_servers_have_left_together(serve_tenant: ServeTenant) -> None:
    async with serve_tenant("--limits.requests_per_minute", "2") as api:
        await api.post(PATHS[0])
        api.app.state.serving.rate_limiter._buckets = TokenBuckets()  # as those of another server
        response = await api.post(PATHS[0])
    assert limits_told(response, "requests")[1] == "0"


@pytest.mark.parametrize("learn", [True, False])
async def test_the_engine_knows_whether_it_may_learn_from_a_tenant(serve: Any, tmp_path: Path, learn: bool) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[tenants.acme]\nkeys = ["{hash_key("secret")}"]\n' + "learn = false\n" * (not learn))
    async with serve(one_token, "--keys-file", str(keys)) as api:
        api.client.headers["Authorization"] = "Bearer secret"
        answers = [await api.post(path, max_tokens=4) for path in PATHS]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [request.learn for request in api.engine.requests] == [learn, learn]


@pytest.mark.parametrize("path", PATHS)
async def test_a_request_counts_once_and_its_tokens_beside_it(serve_tenant: ServeTenant, path: str) -> None:
    limits = ("--limits.requests_per_minute", "2", "--limits.tokens_per_minute", "100000")
    async with serve_tenant(*limits) as api:
        answers = [await api.post(path, max_tokens=4) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert "2 requests a minute" in answers[-1].text


@pytest.mark.parametrize("n", [1, 2])
async def test_a_chat_without_max_tokens_is_never_more_than_a_quarter_of_a_full_bucket(
    serve_tenant: ServeTenant, n: int
) -> None:
    async with serve_tenant("--limits.tokens_per_minute", "60") as api:
        answer = await api.post("/v1/chat/completions", n=n)
        assert answer.status_code == 200, answer.text
        outputs = {request.sampling.max_tokens for request in api.engine.requests}
        too_much = await api.post("/v1/chat/completions", n=n, max_tokens=60 // n)
    assert outputs == {15 // n}
    assert too_much.status_code == 400


def fails_after_a_token(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300])
    yield EngineOutput(request_id=request.request_id, finish_reason="error", error_kind="internal", error="damaged")


@pytest.mark.parametrize("path", PATHS)
async def test_tokens_that_an_answer_did_not_use_are_given_back(serve_tenant: ServeTenant, path: str) -> None:
    async with serve_tenant("--limits.tokens_per_minute", "100") as api:
        answers = [await api.post(path, max_tokens=40) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3


async def test_what_failed_by_no_fault_of_the_tenants_costs_no_tokens(serve: Any) -> None:
    key = ("--auth.keys", f"{uuid.uuid4().hex}={hash_key('secret')}", "--limits.tokens_per_minute", "20")
    async with serve(fails_after_a_token, *key) as api:
        api.client.headers["Authorization"] = "Bearer secret"
        answers = [await api.post("/v1/completions", max_tokens=10) for _ in range(10)]
    assert [answer.status_code for answer in answers] == [500] * 10


async def test_so_much_echo_is_refused_that_is_far_more_than_the_request(
    tiny_model: ModelFiles, tokenizer: Tokenizer, valkey_url: str, tmp_path: Path
) -> None:
    longest = max(range(VOCAB_SIZE), key=lambda token_id: len(tokenizer.token_bytes(token_id)))
    prompts = [[longest] * 32_000] * 12
    async with running_api(one_token, tiny_model, tokenizer, valkey_url, tmp_path, max_model_len=32_768) as api:
        once = await api.post("/v1/completions", prompt=prompts, echo=True, max_tokens=1)
        often = await api.post("/v1/completions", prompt=prompts, echo=True, max_tokens=1, n=16)
        scored = await api.post("/v1/completions", prompt=prompts, echo=True, max_tokens=1, logprobs=2)
    assert once.status_code == 200
    assert {len(choice["text"]) for choice in once.json()["choices"]} == {len(tokenizer.decode([*prompts[0], 300]))}
    for refused in (often, scored):
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")
    assert len(api.engine.requests) == len(prompts)
