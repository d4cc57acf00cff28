"""/v1/responses by the real ``openai`` client: a real server over a socket, and an engine that follows a script."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel
from redis.asyncio import Redis

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server import sse
from evospec.server.tenants import hash_key
from tests.integration.running_api import Api
from tests.integration.tools_model import CALL, THOUGHT, Serve, prompt, saying

TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": False}


def client_of(api: Api, key: str = "none") -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=20)
    return openai.AsyncOpenAI(base_url=f"{api.client.base_url}/v1", api_key=key, http_client=http, max_retries=0)


@asynccontextmanager
async def asking(serve: Serve, script: Any, *options: str) -> AsyncIterator[tuple[Api, openai.AsyncOpenAI]]:
    async with serve(script, *options) as api, client_of(api) as client:
        yield api, client


def plain(response: Response) -> list[dict[str, Any]]:
    """The output without ids."""
    return [item.model_dump(exclude={"id", "call_id"}, exclude_none=True) for item in response.output]


async def test_text_whole(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with asking(tools_api, saying("Yes", tokenizer)) as (api, client):
        response = await client.responses.create(
            model="tiny", input="Hi", instructions="Be", max_output_tokens=9, metadata={"a": "b"}, temperature=0
        )
        assert prompt(api) == "system:Be;user:Hi;"
        assert api.engine.requests[-1].sampling.max_tokens == 9
    assert (response.output_text, response.status, response.error) == ("Yes", "completed", None)
    assert (response.model, response.metadata, response.temperature) == ("tiny", {"a": "b"}, 0)
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


@pytest.mark.parametrize("tokens", [1, 3, 100])
async def test_thoughts_text_and_calls_whole_and_streamed(tools_api: Serve, tokenizer: Tokenizer, tokens: int) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "input": "Hi", "tools": [TOOL]}
    async with asking(tools_api, saying(THOUGHT, tokenizer, tokens=tokens)) as (_, client):
        whole = await client.responses.create(**arguments)
        events = [event async for event in await client.responses.create(**arguments, stream=True)]
    call = {"type": "function_call", "name": "f", "arguments": '{"ä": 1}', "status": "completed"}
    text = {"type": "output_text", "text": "Two:", "annotations": [], "logprobs": []}
    assert plain(whole) == [
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
            "status": "completed",
        },
        {"type": "message", "role": "assistant", "content": [text], "status": "completed"},
        call,
        call,
    ]
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    last: Any = events[-1]
    assert last.type == "response.completed"
    assert plain(last.response) == plain(whole)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events if "delta" not in event.type]
    part = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    calls = ["output_item.added", "function_call_arguments.done", "output_item.done"]
    assert kinds == [
        *("created", "in_progress"),
        *(*part[0], "reasoning_text.done", *part[1]),
        *(*part[0], "output_text.done", *part[1]),
        *calls,
        *calls,
        "completed",
    ]
    for index, joined in enumerate(("Hm", "Two:", '{"ä": 1}', '{"ä": 1}')):
        parts: list[Any] = [event for event in events if "delta" in event.type]
        assert "".join(event.delta for event in parts if event.output_index == index) == joined


async def test_the_clients_own_accumulation_and_parsing(tools_api: Serve, tokenizer: Tokenizer) -> None:
    class Answer(BaseModel):
        a: int

    async with asking(tools_api, saying('{"a": 1}', tokenizer)) as (api, client):
        async with client.responses.stream(model="tiny", input="Hi", text_format=Answer) as stream:
            response = await stream.get_final_response()
        assert response.output_parsed == Answer(a=1)
        grammar = api.engine.requests[-1].sampling.grammar
        assert grammar is not None
        assert grammar.kind == "json_schema"
        again: Any = [*response.output, {"role": "user", "content": "Ho"}]
        await client.responses.create(model="tiny", input=again, store=False)
        assert prompt(api) == 'assistant:{"a": 1};user:Ho;'


async def test_an_answer_that_is_cut_off_is_incomplete(tools_api: Serve, tokenizer: Tokenizer) -> None:
    script = saying(CALL[:44], tokenizer, "length")
    async with asking(tools_api, script) as (api, client):
        whole = await client.responses.create(model="tiny", input="Hi", tools=[TOOL])
        stream = await client.responses.create(model="tiny", input="Hi", tools=[TOOL], stream=True)
        last: Any = [event async for event in stream][-1]
        await client.responses.create(model="tiny", input="Ho", previous_response_id=whole.id)
        assert prompt(api) == "user:Hi;user:Ho;"
    responses: list[Any] = [whole, last.response]
    for response in responses:
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.output[-1].status == "incomplete"
    assert last.type == "response.incomplete"


async def test_items_become_messages(tools_api: Serve, tokenizer: Tokenizer) -> None:
    items: Any = [
        {"role": "developer", "content": "Be"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": "42"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "43"}]},
    ]
    async with asking(tools_api, saying("Yes", tokenizer)) as (api, client):
        await client.responses.create(model="tiny", input=items, tools=[TOOL], tool_choice="none")
        calls = '<tool_call>{"a": 1}<tool_call>{}'
        assert prompt(api) == f"system:Be;user:Hi;assistant:{calls};tool:42;tool:43;"


async def test_a_call_that_was_cut_off_can_be_sent_back_and_is_kept(tools_api: Serve, tokenizer: Tokenizer) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": ', "status": "incomplete"}
    items: Any = [{"role": "user", "content": "Hi"}, call]
    async with asking(tools_api, saying("Yes", tokenizer)) as (api, client):
        first = await client.responses.create(model="tiny", input=items)
        history = 'user:Hi;assistant:<tool_call>"{\\"a\\": ";'
        assert prompt(api) == history
        await client.responses.create(model="tiny", input="Ho", previous_response_id=first.id)
        assert prompt(api) == f"{history}assistant:Yes;user:Ho;"


async def test_a_request_goes_on_from_an_answer_that_was_stored(tools_api: Serve, tokenizer: Tokenizer) -> None:
    def script(request: EngineRequest) -> Any:
        is_second = "tool" in tokenizer.decode(request.prompt_token_ids)
        return saying("Yes" if is_second else CALL, tokenizer)(request)

    async with asking(tools_api, script) as (api, client):
        first = await client.responses.create(model="tiny", input="Hi", instructions="Be", tools=[TOOL])
        [call] = first.output
        assert call.type == "function_call"
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
        second = await client.responses.create(model="tiny", input=[result], previous_response_id=first.id)
        history = 'user:Hi;assistant:<tool_call>{"ä": 1};tool:42;'
        assert prompt(api) == history
        assert (second.output_text, second.previous_response_id, first.to_dict()["store"]) == ("Yes", first.id, True)
        stream = await client.responses.create(model="tiny", input="Ho", previous_response_id=second.id, stream=True)
        assert [event.type async for event in stream][-1] == "response.completed"
        assert prompt(api) == f"{history}assistant:Yes;user:Ho;"
        assert (await client.responses.retrieve(first.id)).to_dict() == first.to_dict()
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as gone:
            await client.responses.create(model="tiny", input="Ho", previous_response_id=first.id)
        assert (gone.value.code, gone.value.param) == ("previous_response_not_found", "previous_response_id")
        await client.responses.create(model="tiny", input="Ho", previous_response_id=second.id)


async def test_another_tenants_answer_is_not_there(tools_api: Serve, tokenizer: Tokenizer) -> None:
    keys = ",".join(f"{name}={hash_key(name)}" for name in ("acme", "other"))
    script = saying("Yes", tokenizer)
    async with tools_api(script, "--auth.keys", keys) as api, client_of(api, "other") as other:
        acme = client_of(api, "acme")
        mine = await acme.responses.create(model="tiny", input="Hi")
        for identifier in (mine.id, "resp_" + "0" * 32, "resp_1", "*"):
            with pytest.raises(openai.BadRequestError):
                await other.responses.create(model="tiny", input="Ho", previous_response_id=identifier)
            with pytest.raises(openai.NotFoundError):
                await other.responses.delete(identifier)
            with pytest.raises(openai.NotFoundError):
                await other.responses.retrieve(identifier)
        assert len(api.engine.requests) == 1
        await acme.responses.create(model="tiny", input="Ho", previous_response_id=mine.id)


async def test_nothing_is_kept_that_is_not_to_be(tools_api: Serve, tokenizer: Tokenizer, valkey_url: str) -> None:
    secret = "5ecret"
    async with Redis.from_url(valkey_url) as redis:

        async def kept() -> int:
            texts = [await redis.get(key) async for key in redis.scan_iter("evospec:responses:*:*")]
            return sum(secret.encode() in (text or b"") for text in texts)

        async with asking(tools_api, saying("Yes", tokenizer)) as (_, client):
            response = await client.responses.create(model="tiny", input=secret, store=False)
            assert response.to_dict()["store"] is False
            assert await kept() == 0
            with pytest.raises(openai.BadRequestError):
                await client.responses.create(model="tiny", input="Ho", previous_response_id=response.id)
            stored = await client.responses.create(model="tiny", input=secret)
            assert await kept() == 1
            [key] = [key async for key in redis.scan_iter(f"evospec:responses:*:{stored.id}")]
            assert 0 < await redis.ttl(key) <= 24 * 3600
            await client.responses.delete(stored.id)
            assert await kept() == 0
        async with asking(tools_api, saying("Yes", tokenizer), "--responses.max_bytes_per_tenant", "0") as (_, client):
            response = await client.responses.create(model="tiny", input=secret)
            assert response.to_dict()["store"] is False
            assert await kept() == 0


async def test_a_tenant_has_only_so_much_and_loses_the_oldest(tools_api: Serve, tokenizer: Tokenizer) -> None:
    bounded = ("--responses.max_bytes_per_tenant", "2100", "--auth.keys", f"bounded={hash_key('bounded')}")
    async with tools_api(saying("Yes", tokenizer), *bounded) as api, client_of(api, "bounded") as client:
        old, new = [await client.responses.create(model="tiny", input=400 * letter) for letter in "ab"]
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model="tiny", input="Ho", previous_response_id=old.id)
        again = await client.responses.create(model="tiny", input="Ho", previous_response_id=new.id)
        assert again.to_dict()["store"] is True
        too_large = await client.responses.create(model="tiny", input=1000 * "c")
        assert too_large.to_dict()["store"] is False
        await client.responses.create(model="tiny", input="Ho", previous_response_id=again.id, store=False)


async def test_without_redis_nothing_is_kept_and_the_answer_says_so(
    tools_api: Serve, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    async with asking(tools_api, saying("Yes", tokenizer), "--redis.url", f"unix://{tmp_path}/none") as (_, client):
        response = await client.responses.create(model="tiny", input="Hi")
        assert (response.output_text, response.to_dict()["store"]) == ("Yes", False)
        with pytest.raises(openai.InternalServerError) as unreachable:
            await client.responses.create(model="tiny", input="Ho", previous_response_id=response.id)
        assert (unreachable.value.status_code, unreachable.value.code) == (503, "responses_unavailable")


async def test_a_failure_within_a_stream_is_an_event(tools_api: Serve, tokenizer: Tokenizer) -> None:
    def script(request: EngineRequest) -> list[EngineOutput]:
        return [EngineOutput(request_id=request.request_id, token_ids=tokenizer.encode("Y"))]

    async with asking(tools_api, script) as (api, client):
        stream = await client.responses.create(model="tiny", input="Hi", stream=True)
        assert (await anext(stream)).type == "response.created"
        [request] = api.engine.requests
        await api.engine.send(EngineOutput(request_id=request.request_id, token_ids=[], finish_reason="error"))
        last: Any = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "server_error")


async def test_a_stream_that_fails_before_its_first_token_begins_all_the_same(
    tools_api: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients want to see a response begin that fails."""
    monkeypatch.setattr(sse, "SILENCE", 0.05)
    async with (
        asking(tools_api, lambda request: []) as (api, client),
        client.responses.stream(model="tiny", input="Hi") as stream,
    ):
        [request] = api.engine.requests
        await api.engine.send(EngineOutput(request_id=request.request_id, token_ids=[], finish_reason="error"))
        events = [event.type async for event in stream]
    assert events == ["response.created", "response.in_progress", "response.failed"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input.0"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": {}}]},
            "input.0.arguments",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}] * 129},
            "input.0.tool_calls",
        ),
        ({"input": "Hi" * 2000}, "input"),
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "Hi", "tools": [{**TOOL, "strict": True, "parameters": {"not": {}}}]}, "tools.0.parameters"),
        ({"input": "Hi", "tool_choice": "required"}, "tool_choice"),
        ({"input": "Hi", "max_tokens": 5}, "max_tokens"),
        ({"input": "Hi", "presence_penalty": 1}, "presence_penalty"),
        ({"input": "Hi", "background": True}, "background"),
        ({"input": "Hi", "truncation": "auto"}, "truncation"),
        ({"input": "Hi", "conversation": "conv_1"}, "conversation"),
        ({"input": "Hi", "include": ["message.output_text.logprobs"]}, "include"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text"),
    ],
)
async def test_what_is_wrong_is_named(tools_api: Serve, tokenizer: Tokenizer, body: Any, param: str) -> None:
    async with tools_api(saying("Yes", tokenizer)) as api:
        response = await api.client.post("/v1/responses", json={"model": "tiny", **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, json.dumps(response.json())


async def test_an_empty_input_is_called_by_its_name(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with tools_api(saying("Yes", tokenizer)) as api:
        error = (await api.client.post("/v1/responses", json={"model": "tiny", "input": []})).json()["error"]
    assert error["message"].startswith("input: ")
    assert "messages" not in error["message"]


async def test_what_there_is_none_of_beside_a_stored_response(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with tools_api(saying("Yes", tokenizer)) as api:
        stored = (await api.client.post("/v1/responses", json={"model": "tiny", "input": "Hi"})).json()
        path = f"/v1/responses/{stored['id']}"
        refused = await api.client.get(path, params={"stream": "true"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
        assert (await api.client.get(path, params={"stream": "false"})).json() == stored
        for name in ("input_tokens", "compact"):
            unknown = await api.client.post(f"/v1/responses/{name}", json={"model": "tiny", "input": "Hi"})
            assert unknown.status_code == 404
            assert unknown.json()["error"]["message"] == f"Unknown path: /v1/responses/{name}"
