"""/v1/messages by the real ``anthropic`` client: a real server over a socket, and an engine that follows a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.tenants import hash_key
from tests.integration.running_api import Api
from tests.integration.tools_model import CALL, THOUGHT, Serve, prompt, saying

TOOL: Any = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
USER: Any = {"role": "user", "content": "Hi"}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
BODY: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 100}


def client_of(api: Api, key: str = "none") -> anthropic.AsyncAnthropic:
    http = anthropic.DefaultAsyncHttpxClient(trust_env=False, timeout=20)
    return anthropic.AsyncAnthropic(base_url=str(api.client.base_url), api_key=key, http_client=http, max_retries=0)


@asynccontextmanager
async def asking(serve: Serve, script: Any, *options: str) -> AsyncIterator[tuple[Api, anthropic.AsyncAnthropic]]:
    async with serve(script, *options) as api, client_of(api) as client:
        yield api, client


def plain(message: Message) -> list[dict[str, Any]]:
    """The content without ids."""
    return [block.model_dump(exclude={"id"}, exclude_none=True) for block in message.content]


async def test_text_whole(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with asking(tools_api, saying("Yes", tokenizer)) as (api, client):
        message = await client.messages.create(
            **BODY,
            system=[{"type": "text", "text": "Be"}],
            stop_sequences=["x"],
            extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7},
        )
        sampling = api.engine.requests[-1].sampling
        assert prompt(api) == "system:Be;user:Hi;"
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 7, 100)
    assert list(sampling.stop) == ["x"]
    assert plain(message) == [{"type": "text", "text": "Yes"}]
    assert (message.role, message.model, message.stop_reason) == ("assistant", "tiny", "end_turn")
    assert message.usage.input_tokens == len(tokenizer.encode("system:Be;user:Hi;", add_special_tokens=False))


@pytest.mark.parametrize("tokens", [1, 3, 100])
async def test_thoughts_text_and_calls_whole_and_streamed(tools_api: Serve, tokenizer: Tokenizer, tokens: int) -> None:
    async with asking(tools_api, saying(THOUGHT, tokenizer, tokens=tokens)) as (_, client):
        whole = await client.messages.create(**BODY, tools=[TOOL])
        async with client.messages.stream(**BODY, tools=[TOOL]) as stream:
            kinds = [event.type async for event in stream]
            joined = await stream.get_final_message()
    call = {"type": "tool_use", "name": "f", "input": {"ä": 1}}
    thoughts = {"type": "thinking", "thinking": "Hm", "signature": ""}
    assert plain(whole) == plain(joined) == [thoughts, {"type": "text", "text": "Two:"}, call, call]
    assert whole.stop_reason == joined.stop_reason == "tool_use"
    assert whole.usage.output_tokens == joined.usage.output_tokens
    raw = [kind for kind in kinds if kind.startswith(("message", "content")) and kind != "content_block_delta"]
    blocks = ["content_block_start", "content_block_stop"] * 4
    assert raw == ["message_start", *blocks, "message_delta", "message_stop"]


async def test_a_call_without_arguments(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with asking(tools_api, saying(CALL.replace('{"ä": 1}', "{}"), tokenizer)) as (_, client):
        whole = await client.messages.create(**BODY, tools=[TOOL])
        async with client.messages.stream(**BODY, tools=[TOOL]) as stream:
            joined = await stream.get_final_message()
    assert plain(whole) == plain(joined) == [{"type": "tool_use", "name": "f", "input": {}}]


async def test_events_are_named_as_their_type(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with tools_api(saying("Yes", tokenizer, tokens=100)) as api:
        response = await api.client.post("/v1/messages", json={**BODY, "stream": True})
    events = [block.split("\n") for block in response.text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == [json.loads(data.removeprefix("data: "))["type"] for _, data in events]
    assert names[:4] == ["message_start", "ping", "content_block_start", "content_block_delta"]


async def test_calls_and_results_become_messages(tools_api: Serve, tokenizer: Tokenizer) -> None:
    def use(identifier: str, **arguments: int) -> dict[str, Any]:
        return {"type": "tool_use", "id": identifier, "name": "f", "input": arguments}

    def result(identifier: str, content: Any, **more: Any) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": identifier, "content": content, **more}

    messages: Any = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "Two:"}, use("1", a=1), use("2")]},
        {
            "role": "user",
            "content": [
                result("1", [{"type": "text", "text": "42"}]),
                result("2", "no", is_error=True),
                {"type": "text", "text": "So", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    async with asking(tools_api, saying("Yes", tokenizer)) as (api, client):
        await client.messages.create(**BODY | {"messages": messages}, tools=[TOOL], tool_choice={"type": "none"})
        calls = '<tool_call>{"a": 1}<tool_call>{}'
        assert prompt(api) == f"user:Hi;assistant:Two:{calls};tool:42;tool:Error: no;user:So;"


@pytest.mark.parametrize("choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "f"}])
async def test_a_choice_of_tools_holds_the_answer_to_a_call(
    tools_api: Serve, tokenizer: Tokenizer, choice: Any
) -> None:
    async with asking(tools_api, saying(CALL, tokenizer)) as (api, client):
        await client.messages.create(**BODY, tools=[TOOL], tool_choice=choice)
        grammar = api.engine.requests[-1].sampling.grammar
    assert grammar is not None
    tag = json.loads(grammar.schema or "")["format"]
    assert str(tag).count("'stop_after_first': True") == 1


async def test_why_an_answer_ends(tools_api: Serve, tokenizer: Tokenizer) -> None:
    for reason, stop, expected in (("length", None, "max_tokens"), ("stop", "m", "stop_sequence")):
        async with asking(tools_api, saying(CALL[:44], tokenizer, reason, stop=stop)) as (_, client):
            whole = await client.messages.create(**BODY, tools=[TOOL], stop_sequences=["m"])
            async with client.messages.stream(**BODY, tools=[TOOL], stop_sequences=["m"]) as stream:
                joined = await stream.get_final_message()
        assert whole.stop_reason == joined.stop_reason == expected
        assert whole.stop_sequence == joined.stop_sequence == stop
        assert whole.content == []  # of a call that was cut off


async def test_tokens_are_counted_as_the_model_sees_them(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with asking(tools_api, saying("Yes", tokenizer)) as (api, client):
        counted = await client.messages.count_tokens(model="tiny", messages=[USER], system="Be", tools=[TOOL])
        await client.messages.create(**BODY, system="Be", tools=[TOOL])
        assert counted.input_tokens == len(api.engine.requests[-1].prompt_token_ids)


async def test_keys_and_errors_are_anthropics(tools_api: Serve, tokenizer: Tokenizer) -> None:
    options = ("--auth.keys", f"acme={hash_key('secret')}", "--limits.requests_per_minute", "5")
    async with tools_api(saying("Yes", tokenizer), *options) as api:
        stranger = client_of(api, "wrong")
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            await stranger.messages.create(**BODY)
        async with client_of(api, "secret") as client:
            answer = await client.messages.create(**BODY)
            assert answer._request_id
            with pytest.raises(anthropic.NotFoundError) as missing:
                await client.messages.create(**BODY | {"model": "other"})
            with pytest.raises(anthropic.BadRequestError) as wrong:
                await client.messages.create(**BODY | {"max_tokens": 0})
            [model] = (await client.models.list()).data
            assert (model.type, model.display_name, model.created_at.year > 2000) == ("model", "tiny", True)
            with pytest.raises(anthropic.RateLimitError) as limited:
                await asyncio.gather(*(client.messages.create(**BODY) for _ in range(9)))
    for error, kind in (
        (unknown.value, "authentication_error"),
        (missing.value, "not_found_error"),
        (wrong.value, "invalid_request_error"),
        (limited.value, "rate_limit_error"),
    ):
        body: Any = error.body
        assert (body["type"], body["error"]["type"]) == ("error", kind)
        assert body["request_id"] == error.request_id
    assert "max_tokens" in wrong.value.message


async def test_a_failure_within_a_stream_is_an_event(tools_api: Serve, tokenizer: Tokenizer) -> None:
    def script(request: EngineRequest) -> list[EngineOutput]:
        return [EngineOutput(request_id=request.request_id, token_ids=tokenizer.encode("Y"))]

    async with asking(tools_api, script) as (api, client):
        stream = await client.messages.create(**BODY, stream=True)
        assert (await anext(stream)).type == "message_start"
        [request] = api.engine.requests
        await api.engine.send(
            EngineOutput(request_id=request.request_id, token_ids=[], finish_reason="error", error_kind="overloaded")
        )
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
            [event async for event in stream]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "assistant's only"),
        ({"messages": [USER, {"role": "assistant", "content": "Y"}]}, "no answer goes on with it"),
        (
            {"messages": [{"role": "assistant", "content": [USE] * 129}, USER]},
            "messages.0.tool_calls",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"stop": ["x"]}, "stop_sequences"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "schema"),
        ({"messages": [{"role": "user", "content": "Hi" * 2000}]}, "context"),
    ],
)
async def test_what_is_wrong_is_named(tools_api: Serve, tokenizer: Tokenizer, body: Any, named: str) -> None:
    async with tools_api(saying("Yes", tokenizer)) as api:
        response = await api.client.post("/v1/messages", json={**BODY, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert named in response.json()["error"]["message"]
