"""The HTTP API: bodies, streams, errors, clients that go away, engines that die."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from evospec.engine.messages import EngineOutput, EngineRequest, EngineStats, StepTimings, TokenLogprob
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server import sse
from evospec.server.engine_metrics import EngineMetrics
from evospec.server.tenants import hash_key
from tests.integration.running_api import CHAT, TEXT
from tests.integration.scripted_engine import Script, ScriptedEngine
from tests.tiny_models import VOCAB_SIZE

REPLY = "naïve 東京 👩‍🚀 end"


@pytest.fixture
def replies(tokenizer: Tokenizer) -> Script:
    """A script that answers with REPLY, a token a step, with two alternatives for each if asked."""
    ids = tokenizer.encode(REPLY, add_special_tokens=False)

    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        wants = request.sampling
        ahead = request.prompt_token_ids[1:] if wants.prompt_logprobs is not None else []
        for number, token_id in enumerate(ids):
            is_first, is_last = number == 0, number == len(ids) - 1
            yield EngineOutput(
                request_id=request.request_id,
                token_ids=[token_id],
                logprobs=None if wants.logprobs is None else [logprob(token_id, wants.logprobs)],
                prompt_logprobs=[msgspec.msgpack.encode([logprob(t, 0)]) for t in ahead] if is_first else None,
                finish_reason="stop" if is_last else None,
                num_cached_tokens=1 if is_first else 0,
            )

    return script


def logprob(token_id: int, alternatives: int) -> TokenLogprob:
    return TokenLogprob(token_id, -0.5, [(token_id, -0.5), (3, float("-inf"))][:alternatives])


def endless(request: EngineRequest) -> Iterable[EngineOutput]:
    """One token, and then nothing more."""
    yield EngineOutput(request_id=request.request_id, token_ids=[request.prompt_token_ids[0] + 100])


def silent(request: EngineRequest) -> Iterable[EngineOutput]:
    return ()


def refusing(kind: Any, message: str | None = None) -> Script:
    return lambda request: [
        EngineOutput(request_id=request.request_id, finish_reason="error", error=message, error_kind=kind)
    ]


async def test_completion_has_text_usage_and_finish_reason(serve: Any, replies: Script) -> None:
    async with serve(replies) as api:
        body = (await api.post("/v1/completions")).json()
        prompt_tokens = len(api.tokenizer.encode(TEXT["prompt"]))
        completion_tokens = len(api.tokenizer.encode(REPLY, add_special_tokens=False))
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("ab", ["ab"]), (["ab", "cd"], ["ab", "cd"]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]])],
)
async def test_every_prompt_form_reaches_the_engine(
    serve: Any, replies: Script, prompt: Any, expected: list[Any]
) -> None:
    async with serve(replies) as api:
        body = (await api.post("/v1/completions", prompt=prompt, n=2, seed=7)).json()
        sent = [(r.prompt_token_ids, r.sampling.seed) for r in api.engine.requests]
        encode = api.tokenizer.encode
    ids = [encode(item) if isinstance(item, str) else item for item in expected]
    assert sent == [(item, 7 + choice) for item in ids for choice in (0, 1)]
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_stream_joins_to_the_whole_text_and_never_splits_a_character(serve: Any, replies: Script) -> None:
    async with serve(replies) as api:
        events = await api.events("/v1/chat/completions", stream_options={"include_usage": True})
        whole = (await api.post("/v1/chat/completions")).json()
    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == REPLY == whole["choices"][0]["message"]["content"]
    assert not any("\ufffd" in delta["content"] for delta in deltas)
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert {event["id"] for event in events} == {usage["id"]}
    assert all(event["usage"] is None for event in events)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_log_line_of_a_request_has_its_figures(serve: Any, replies: Script, stream: bool) -> None:
    async with serve(replies) as client:
        with capture_logs() as lines:
            response = await client.post("/v1/completions", json={**TEXT, "stream": stream})
            assert response.status_code == 200
    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["completion_tokens"] > 3
    assert line["prompt_tokens"] > 0
    assert line["cached_tokens"] == 1
    assert line["ttft_ms"] >= 0
    assert line["acceptance_length"] is None


async def test_a_stop_string_across_tokens_never_leaks(serve: Any, tokenizer: Tokenizer) -> None:
    text = "one STOP"
    ids = tokenizer.encode(text, add_special_tokens=False)

    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        for number, token_id in enumerate(ids):
            last = number == len(ids) - 1
            yield EngineOutput(
                request_id=request.request_id,
                token_ids=[token_id],
                finish_reason="stop" if last else None,
                stop_reason=" STOP" if last else None,
                text_length=3 if last else None,
            )

    async with serve(script) as api:
        events = await api.events("/v1/completions", stop=[" STOP"])
        assert api.engine.requests[0].sampling.stop == (" STOP",)
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == "one"
    assert choices[-1]["stop_reason"] == " STOP"


@pytest.mark.parametrize("prompt", [TEXT["prompt"], "<|im_start|>user\nHi é<|im_end|>\n<|im_start|>"])
async def test_completion_logprobs_and_echo(serve: Any, replies: Script, prompt: str) -> None:
    async with serve(replies) as api:
        choice = (await api.post("/v1/completions", prompt=prompt, logprobs=2, echo=True)).json()["choices"][0]
        events = await api.events("/v1/completions", prompt=prompt, logprobs=2, echo=True)
        prompt_ids = api.tokenizer.encode(prompt)
        assert [r.sampling.prompt_logprobs for r in api.engine.requests] == [2, 2]
    logprobs = choice["logprobs"]
    assert choice["text"] == prompt + REPLY
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-0.5] * (len(logprobs["tokens"]) - 1)
    assert min(logprobs["top_logprobs"][-1].values()) == -9999
    whole = [
        (offset, token) for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        if not token.startswith("bytes:")
    ]  # fmt: skip
    assert len(whole) > len(prompt_ids)
    assert all(choice["text"][offset : offset + len(token)] == token for offset, token in whole)
    streamed = [event["choices"][0] for event in events[:-1]]
    assert "".join(part["text"] for part in streamed) == choice["text"]
    assert {key: [v for part in streamed for v in part["logprobs"][key]] for key in logprobs} == logprobs


async def test_a_token_without_text_has_no_bytes_in_chat(serve: Any, tokenizer: Tokenizer) -> None:
    [end, *_] = tokenizer.eos_token_ids
    [letter] = tokenizer.encode("a", add_special_tokens=False)

    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        logprobs = [logprob(token_id, 1) for token_id in (letter, end)]
        yield EngineOutput(
            request_id=request.request_id,
            token_ids=[letter, end],
            logprobs=logprobs,
            text_length=1,
            finish_reason="stop",
        )

    async with serve(script) as api:
        choice = (await api.post("/v1/chat/completions", logprobs=True, top_logprobs=1)).json()["choices"][0]
    text, last = choice["logprobs"]["content"]
    assert bytes(text["bytes"]).decode() == choice["message"]["content"]
    assert (last["token"], last["bytes"]) == (tokenizer.id_to_token(end), None)


async def test_chat_logprobs_carry_the_bytes_of_each_token(serve: Any, replies: Script) -> None:
    async with serve(replies) as api:
        choice = (await api.post("/v1/chat/completions", logprobs=True, top_logprobs=2)).json()["choices"][0]
        plain = (await api.post("/v1/chat/completions", logprobs=True)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == REPLY
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    assert all(entry["top_logprobs"] == [] for entry in plain["logprobs"]["content"])


async def test_scoring_a_prompt_without_output(serve: Any, replies: Script) -> None:
    async with serve(replies) as api:
        body = (await api.post("/v1/completions", logprobs=1, echo=True, max_tokens=0)).json()
        assert api.engine.requests[0].sampling.max_tokens == 1
    assert body["choices"][0]["text"] == TEXT["prompt"]
    assert body["usage"]["completion_tokens"] == 0
    assert len(body["choices"][0]["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"model": "other"}, 404, "model"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": [VOCAB_SIZE]}, 400, "prompt"),
        ("/v1/completions", {"prompt": [5] * 64}, 400, "prompt"),
        ("/v1/completions", {"min_tokens": 17}, 400, "min_tokens"),
        ("/v1/completions", {"num_speculative_tokens": 9}, 400, "num_speculative_tokens"),
        ("/v1/chat/completions", {"num_speculative_tokens": -1}, 400, "num_speculative_tokens"),
        ("/v1/completions", {"stop_token_ids": [VOCAB_SIZE]}, 400, "stop_token_ids"),
        ("/v1/completions", {"logit_bias": {str(VOCAB_SIZE): 1}}, 400, "logit_bias"),
        ("/v1/completions", {"logit_bias": {"-1": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, 400, "prompt"),
        ("/detokenize", {"prompt": None, "tokens": [VOCAB_SIZE]}, 400, "prompt"),
    ],
)
async def test_bad_requests_name_the_field(
    serve: Any, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    async with serve(silent) as api:
        response = await api.post(path, **body)
        assert api.engine.requests == []
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "raw",
    [
        b"{", b"", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'{"model": NaN}',
        b'{"model": "tiny", "prompt": "\\ud800"}', b'{"\\ud800": 1}',
        b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
async def test_bodies_that_are_no_request_get_400(serve: Any, raw: bytes) -> None:
    async with serve(silent) as api:
        response = await api.client.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_body_over_the_limit_gets_413(serve: Any) -> None:
    async with serve(silent, "--http.max_body_bytes", "1000") as api:
        response = await api.post("/v1/completions", prompt="a" * 1000)
        chunks = (b" " * 100 for _ in range(20))

        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        chunked = await api.client.post("/v1/completions", content=body())
    assert (response.status_code, chunked.status_code) == (413, 413)


async def test_unknown_paths_and_methods_have_error_bodies(serve: Any) -> None:
    async with serve(silent) as api:
        unknown = await api.client.get("/v2/none")
        wrong_method = await api.client.get("/v1/completions")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    assert wrong_method.status_code == 405
    assert wrong_method.headers["allow"] == "POST"
    assert "error" in wrong_method.json()


@pytest.mark.parametrize(
    ("given", "echoed"), [("abc-1.2:3", True), ("a" * 129, False), ("a b", False), ("<script>", False)]
)
async def test_request_ids_are_echoed_if_harmless(serve: Any, given: str, echoed: bool) -> None:
    async with serve(silent) as api:
        response = await api.client.get("/v1/models", headers={"X-Request-Id": given})
    assert (response.headers["x-request-id"] == given) is echoed
    assert response.headers["x-request-id"] == response.headers["request-id"]  # Anthropic's name for it


async def test_health_can_be_asked_without_a_body(serve: Any) -> None:
    async with serve(silent) as api:
        assert (await api.client.head("/health")).status_code == 200


@pytest.mark.parametrize("fails", [False, True])
async def test_a_stream_that_waits_for_its_first_token_is_not_silent(
    serve: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Proxies and clients give up on what sends nothing."""
    monkeypatch.setattr(sse, "SILENCE", 0.05)
    body = {"model": "tiny", "prompt": "a", "stream": True}
    async with serve(silent) as api, api.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        assert response.status_code == 200
        assert [await anext(lines) for _ in range(4)] == [": nothing yet", "", ": nothing yet", ""]
        [request] = api.engine.requests
        await api.engine.send(
            EngineOutput(request_id=request.request_id, token_ids=[100], finish_reason="error" if fails else "stop")
        )
        events = [line async for line in lines if line.startswith("data: ")]
    assert ("error" in json.loads(events[0].removeprefix("data: "))) is fails
    assert (events[-1] == "data: [DONE]") is not fails


async def test_models_and_tokens(serve: Any) -> None:
    async with serve(silent) as api:
        models = (await api.client.get("/v1/models")).json()
        model = await api.client.get("/v1/models/tiny")
        missing = await api.client.get("/v1/models/other")
        tokens = (await api.client.post("/tokenize", json={"prompt": REPLY, "add_special_tokens": False})).json()
        chat = (await api.client.post("/tokenize", json={"messages": CHAT["messages"]})).json()
        text = (await api.client.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        rendered = (await api.client.post("/detokenize", json={"tokens": chat["tokens"]})).json()
    assert models["data"] == [model.json()]
    assert (model.json()["id"], model.json()["root"], model.json()["max_model_len"]) == ("tiny", "tiny", 64)
    assert model.json()["default_sampling_params"]["temperature"] == 0.7
    assert missing.status_code == 404
    assert tokens["count"] == len(tokens["tokens"])
    assert text == {"prompt": REPLY}
    assert rendered["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def test_a_key_is_needed_where_there_are_keys(serve: Any) -> None:
    async with serve(silent, "--auth.keys", f"acme={hash_key('secret')}") as api:
        without = await api.client.get("/v1/models")
        with_key = await api.client.get("/v1/models", headers={"Authorization": "Bearer secret"})
        health = await api.client.get("/health")
        body_unread = await api.client.post("/v1/completions", content=b"{")
    assert (without.status_code, with_key.status_code, health.status_code) == (401, 200, 200)
    assert body_unread.status_code == 401
    assert without.json()["error"]["type"] == "authentication_error"


async def test_metrics_of_all_tenants_are_for_one_of_them(serve: Any) -> None:
    keys = f"acme={hash_key('secret')},prometheus={hash_key('scrape')}"
    async with serve(silent, "--auth.keys", keys) as api:
        answers = [
            await api.client.get("/metrics", headers={"Authorization": f"Bearer {key}"}) for key in ("secret", "scrape")
        ]
    assert [answer.status_code for answer in answers] == [403, 200]


async def test_the_key_for_metrics_is_for_nothing_else(serve: Any) -> None:
    key = {"Authorization": "Bearer scrape"}
    async with serve(silent, "--auth.keys", f"scraper={hash_key('scrape')}", "--auth.metrics_tenant", "scraper") as api:
        refused = [
            await api.client.request(method, path, headers=key)
            for method, path in [
                ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/sessions"),
                ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/models"), ("GET", "/v1/sessions/x"),
                ("DELETE", "/v1/sessions/x"), ("GET", "/openapi.json"), ("POST", "/v1/responses"),
                ("DELETE", "/v1/responses/x"), ("GET", "/v1/responses/x"),
            ]
        ]  # fmt: skip
        metrics = await api.client.get("/metrics", headers=key)
    assert [answer.status_code for answer in refused] == [403] * len(refused)
    assert refused[0].json()["error"] == {
        "message": "The tenant 'scraper' may read /metrics only (auth.metrics_tenant).",
        "type": "permission_error",
        "param": None,
        "code": None,
    }
    assert metrics.status_code == 200


async def test_tokenizing_is_bounded_and_counts_as_a_request(serve: Any) -> None:
    async with serve(silent, "--limits.requests_per_minute", "2") as api:
        too_long = await api.post("/tokenize", prompt="a " * 1_000_000)
        answers = [await api.post("/tokenize"), await api.client.post("/detokenize", json={"tokens": [1]})]
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert [answer.status_code for answer in answers] == [200, 429]


@pytest.mark.parametrize(
    ("kind", "status", "retry"), [("overloaded", 503, True), ("invalid", 400, False), ("internal", 500, False)]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_engine_errors_become_statuses(serve: Any, kind: str, status: int, retry: bool, stream: bool) -> None:
    async with serve(refusing(kind, "no such grammar")) as api:
        response = await api.post("/v1/completions", stream=stream)
        metrics = await api.client.get("/metrics")
    assert 'evospec:prompt_tokens_total{model="tiny",tenant="default"} 0.0' in metrics.text
    assert response.status_code == status
    assert ("retry-after" in response.headers) is retry
    assert ("no such grammar" in response.text) is (kind == "invalid")


async def test_more_than_the_engine_can_queue_is_refused_at_once(serve: Any) -> None:
    async with serve(silent, "--engine.scheduler.max_waiting", "1", "--engine.scheduler.max_num_seqs", "1") as api:
        first = asyncio.create_task(api.post("/v1/completions", n=2))
        await api.until(lambda: len(api.engine.requests) == 2)
        refused = await api.post("/v1/completions")
        first.cancel()
        await api.until(lambda: len(api.engine.aborted) == 2)
        assert len(api.engine.requests) == 2
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "overloaded"


async def test_a_tenant_with_all_that_the_engine_takes_does_not_lock_out_others(serve: Any) -> None:
    limits = ("--engine.scheduler.max_waiting", "2", "--engine.scheduler.max_num_seqs", "2")
    keys = ",".join(f"{name}={hash_key(name)}" for name in ("acme", "beta"))
    async with serve(silent, "--auth.keys", keys, *limits) as api:

        def post(key: str, n: int) -> asyncio.Task[httpx.Response]:
            headers = {"Authorization": f"Bearer {key}"}
            return asyncio.create_task(api.client.post("/v1/completions", json={**TEXT, "n": n}, headers=headers))

        first = post("acme", 4)
        await api.until(lambda: len(api.engine.requests) == 4)
        second = post("beta", 2)
        await api.until(lambda: len(api.engine.requests) == 6)
        refused = [(await post(key, 1)).status_code for key in ("acme", "beta")]
        first.cancel()
        second.cancel()
    assert refused == [503, 503]


async def test_more_than_the_engine_ever_takes_is_the_clients_mistake(serve: Any) -> None:
    async with serve(silent, "--engine.scheduler.max_waiting", "1", "--engine.scheduler.max_num_seqs", "1") as api:
        refused = await api.post("/v1/completions", n=3)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "n"
    assert "retry-after" not in refused.headers


@pytest.mark.parametrize("script", [silent, endless])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_aborts_its_sequences(serve: Any, script: Script, stream: bool) -> None:
    async with serve(script) as api:
        request = asyncio.create_task(api.post("/v1/completions", stream=stream, n=2))
        await api.until(lambda: len(api.engine.requests) == 2)
        request.cancel()
        await api.until(lambda: len(api.engine.aborted) == 2)
        assert set(api.engine.aborted) == {r.request_id for r in api.engine.requests}
        await api.until(lambda: api.app.state.serving.engine.in_flight == 0)
        metrics = (await api.client.get("/metrics")).text
    assert 'evospec:client_disconnects_total{model="tiny",tenant="default"} 1.0' in metrics


async def test_a_dead_engine_ends_requests_and_a_new_one_serves_again(serve: Any, replies: Script) -> None:
    async with serve(endless, "--http.engine_timeout", "1000") as api:
        async with api.client.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            whole = asyncio.create_task(api.post("/v1/completions"))
            await api.until(lambda: len(api.engine.requests) == 2)
            await api.engine.die()
            rest = [line async for line in lines if line]
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert error["code"] == "engine_unavailable"
        response = await whole
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
        await api.until_health(503)
        assert (await api.post("/v1/completions")).status_code == 503
        metrics = (await api.client.get("/metrics")).text.splitlines()
        # The stream that had begun with 200, the whole answer, and the one that came too late.
        assert (
            'evospec:requests_total{endpoint="/v1/completions",model="tiny",status="503",tenant="default"} 3.0'
            in metrics
        )
        assert {"evospec:num_requests_running 0.0", "evospec:num_requests_waiting 0.0"} <= set(metrics)
        assert not any(line.startswith("evospec:num_requests_waiting_by_tenant{") for line in metrics)

        api.engine = ScriptedEngine(api.address, replies, VOCAB_SIZE)
        await api.until_health(200)
        assert (await api.post("/v1/completions")).json()["choices"][0]["text"] == REPLY
        assert "evospec:engine_restarts_total 1.0" in (await api.client.get("/metrics")).text


async def test_an_engine_with_other_tokens_gets_no_requests(serve: Any, replies: Script) -> None:
    async with serve(replies) as api:
        await api.engine.die()
        await api.until_health(503)
        with capture_logs() as lines:
            api.engine = ScriptedEngine(api.address, replies, VOCAB_SIZE, vocabulary="another")
            await api.until(lambda: api.engine.num_greetings > 2)
            refused = await api.post("/v1/completions")
            health = await api.client.get("/health")
        assert api.engine.requests == []
        await api.engine.die()
        api.engine = ScriptedEngine(api.address, replies, VOCAB_SIZE)
        await api.until_health(200)
    assert (refused.status_code, health.status_code) == (503, 503)
    errors = [line for line in lines if line["log_level"] == "error"]
    assert [line["engine_vocabulary"] for line in errors] == ["another"]


async def test_an_epoch_that_changes_unseen_ends_requests(serve: Any) -> None:
    async with serve(silent) as api:
        request = asyncio.create_task(api.post("/v1/completions"))
        await api.until(lambda: api.engine.requests)
        api.engine.epoch = "another"
        await api.engine.send()
        response = await request
    assert response.status_code == 503
    assert "restarted" in response.json()["error"]["message"]


async def test_a_silent_engine_counts_as_dead_until_it_speaks(serve: Any) -> None:
    # Long enough that a machine busy with other tests answers in time: a lost engine gets no requests.
    async with serve(silent, "--http.engine_timeout", "2") as api:
        request = asyncio.create_task(api.post("/v1/completions"))
        await api.until(lambda: api.engine.requests)
        api.engine.silent = True
        response = await request
        assert (await api.client.get("/health")).status_code == 503
        api.engine.silent = False
        await api.until_health(200)
    assert response.status_code == 503


async def test_draining_refuses_new_requests_and_finishes_running_ones(serve: Any) -> None:
    async with serve(endless) as api:
        request = asyncio.create_task(api.post("/v1/completions"))
        await api.until(lambda: api.engine.requests)
        api.app.state.leaving = api.app.state.draining = True
        refused = await api.post("/v1/completions")
        health = await api.client.get("/health")
        await api.engine.send(EngineOutput(request_id=api.engine.requests[0].request_id, finish_reason="length"))
        finished = await request
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert health.status_code == 503
    assert finished.json()["choices"][0]["finish_reason"] == "length"


async def test_metrics_show_requests_and_the_engine(serve: Any, replies: Script) -> None:
    async with serve(replies) as api:
        usage = (await api.post("/v1/completions")).json()["usage"]
        await api.post("/v1/completions", model="other")
        stats = EngineStats(
            num_waiting=2, num_running=3, blocks_used=4, blocks_total=8, prefix_query_tokens=10, prefix_hit_tokens=6,
            preemptions=1, nonfinite_sequences=3, waiting_by_tenant={"default": 2},
        )  # fmt: skip
        await api.engine.send(stats=stats)  # counters say how many since the start: sent twice, they count once
        await api.engine.send(stats=stats, steps=[StepTimings(0.125, 0.25, 0.5, 0.5, 5, 2, draft=1.0)])
        await api.until_get("/metrics", lambda response: "step_tokens_count 1.0" in response.text)
        text = (await api.client.get("/metrics")).text  # metrics are written one by one
    labels = 'model="tiny",tenant="default"'
    expected = [
        f'evospec:requests_total{{endpoint="/v1/completions",{labels[:12]},status="200",{labels[13:]}}} 1.0',
        f'evospec:requests_total{{endpoint="/v1/completions",{labels[:12]},status="404",{labels[13:]}}} 1.0',
        f"evospec:generation_tokens_total{{{labels}}} {float(usage['completion_tokens'])}",
        f"evospec:prompt_tokens_total{{{labels}}} {float(usage['prompt_tokens'])}",
        f"evospec:time_to_first_token_seconds_count{{{labels}}} 1.0",
        "evospec:num_requests_waiting 2.0",
        'evospec:num_requests_waiting_by_tenant{tenant="default"} 2.0',
        "evospec:kv_blocks_used 4.0",
        "evospec:prefix_cache_hits_total 6.0",
        "evospec:preemptions_total 1.0",
        "evospec:nonfinite_sequences_total 3.0",
        'evospec:engine_step_seconds_sum{part="draft"} 1.0',
        'evospec:engine_step_seconds_sum{part="verify"} 0.25',
        'evospec:engine_step_seconds_sum{part="sample"} 0.5',
        'evospec:engine_step_seconds_sum{part="overhead"} 0.625',
        'evospec:engine_step_seconds_sum{part="total"} 2.375',
        'evospec:engine_info{attention_backend="none",draft="none",dtype="float32"} 1.0',
        "evospec:kv_cache_bytes 1024.0",
        "evospec:draft_bytes 0.0",
        "evospec:engine_up 1.0",
    ]
    lines = text.splitlines()
    assert [line for line in expected if line not in lines] == []


async def test_a_message_that_cannot_be_read_ends_requests_and_hides_no_later_one(serve: Any, replies: Script) -> None:
    """Nobody knows whose tokens were in it: an answer without them would be wrong."""
    async with serve(silent) as api:
        running = asyncio.create_task(api.post("/v1/completions"))
        await api.until(lambda: api.engine.requests)
        await api.engine._socket.send_multipart([api.engine._peer, b"\xc1"])
        ended = await running
        api.engine._script = replies
        await api.until_health(200)
        answered = await api.post("/v1/completions")
    assert (ended.status_code, ended.json()["error"]["code"]) == (503, "engine_unavailable")
    assert answered.status_code == 200


async def test_answers_do_not_depend_on_metrics(serve: Any, replies: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("injected")

    async with serve(replies) as api:
        monkeypatch.setattr(EngineMetrics, "observe", fail)
        answers = [await api.post("/v1/completions") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3


async def test_parts_that_are_switched_off_leave_the_server_healthy_but_degraded(serve: Any) -> None:
    stats = EngineStats(
        num_waiting=0, num_running=0, blocks_used=0, blocks_total=8, prefix_query_tokens=0, prefix_hit_tokens=0,
        preemptions=0, faults={"draft": 3, "log": 1}, switched_off=["draft"], failed_steps=2,
    )  # fmt: skip
    async with serve(silent) as api:
        sound = (await api.client.get("/health")).json()
        for _ in range(2):
            await api.engine.send(stats=stats)
        await api.until_get("/health", lambda response: response.json()["switched_off"])
        degraded = await api.client.get("/health")
        lines = (await api.client.get("/metrics")).text.splitlines()
    assert sound == {"status": "ok", "switched_off": []}
    assert (degraded.status_code, degraded.json()) == (200, {"status": "degraded", "switched_off": ["draft"]})
    assert 'evospec:optional_part_faults_total{part="draft"} 3.0' in lines
    assert 'evospec:optional_part_off{part="draft"} 1.0' in lines
    assert 'evospec:optional_part_off{part="log"} 0.0' in lines
    assert "evospec:failed_steps_total 2.0" in lines


async def test_openapi_needs_a_key_where_there_are_keys(serve: Any) -> None:
    async with serve(silent, "--auth.keys", f"acme={hash_key('secret')}") as api:
        refused = await api.client.get("/openapi.json")
        given = await api.client.get("/openapi.json", headers={"Authorization": "Bearer secret"})
        other_path = await api.client.get("/v1/models/", headers={"Authorization": "Bearer secret"})
    assert (refused.status_code, given.status_code, other_path.status_code) == (401, 200, 404)


async def test_openapi_describes_bodies_and_every_reference_resolves(serve: Any) -> None:
    async with serve(silent) as api:
        schema = (await api.client.get("/openapi.json")).json()
    operation = schema["paths"]["/v1/chat/completions"]["post"]
    assert set(operation["responses"]) == {"200", "400", "401", "403", "404", "413", "429", "503"}
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("ChatCompletionRequest")
    references = {part.split('"')[0] for part in json.dumps(schema).split('"#/components/schemas/')[1:]}
    assert references <= set(schema["components"]["schemas"])
