"""Tools over HTTP: what reaches the engine, and what becomes of what the engine writes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from evospec.engine.text.chat_template import ChatTemplate
from evospec.engine.text.tokenizer import Tokenizer
from tests.integration.running_api import Api
from tests.integration.tools_model import CALL, Serve, saying

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "Hi"}
PAST = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def prompt(api: Api) -> str:
    return api.tokenizer.decode(api.engine.requests[-1].prompt_token_ids)


def joined(events: list[Any]) -> dict[str, Any]:
    """The message that a stream's events make."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for event in events[:-1]:
        delta = event["choices"][0]["delta"]
        message["content"] += delta.get("content", "")
        message["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert (call["type"], call["index"]) == ("function", len(message["tool_calls"]))
                message["tool_calls"].append({"name": call["function"].pop("name"), "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


@pytest.mark.parametrize("tokens", [1, 2, 5, 100])
async def test_calls_whole_and_streamed(tools_api: Serve, tokenizer: Tokenizer, tokens: int) -> None:
    text = f"<think>\nHm\n</think>\n\nTwo:\n{CALL}\n{CALL}"
    async with tools_api(saying(text, tokenizer, tokens=tokens)) as api:
        [choice] = (await api.post(CHAT, tools=[TOOL])).json()["choices"]
        events = await api.events(CHAT, tools=[TOOL])
    functions = [{"name": "f", "arguments": '{"ä": 1}'}] * 2
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Two:"
    assert choice["message"]["reasoning_content"] == "Hm"
    assert [call["function"] for call in choice["message"]["tool_calls"]] == functions
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2
    assert joined(events) == {"content": "Two:", "reasoning_content": "Hm", "tool_calls": functions}
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_an_answer_of_calls_alone_has_no_content(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with tools_api(saying(CALL, tokenizer)) as api:
        [choice] = (await api.post(CHAT, tools=[TOOL], tool_choice="required")).json()["choices"]
        events = await api.events(CHAT, tools=[TOOL])
    assert choice["message"]["content"] is None
    assert "reasoning_content" not in choice["message"]
    assert not any(event["choices"][0]["delta"].get("content") for event in events[:-1])


@pytest.mark.parametrize(("finish_reason", "stop"), [("length", None), ("stop", "1")])
async def test_a_call_that_is_cut_off_is_none_to_make(
    tools_api: Serve, tokenizer: Tokenizer, finish_reason: str, stop: str | None
) -> None:
    async with tools_api(saying(CALL[:44], tokenizer, finish_reason, stop=stop)) as api:
        [choice] = (await api.post(CHAT, tools=[TOOL])).json()["choices"]
        events = await api.events(CHAT, tools=[TOOL])
    [call] = choice["message"]["tool_calls"]
    assert CALL[:44].endswith(call["function"]["arguments"])
    assert choice["finish_reason"] == events[-2]["choices"][0]["finish_reason"] == finish_reason


async def test_a_call_that_was_cut_off_can_be_sent_back(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with tools_api(saying(CALL[:44], tokenizer, "length")) as api:
        [choice] = (await api.post(CHAT, tools=[TOOL])).json()["choices"]
        response = await api.post(CHAT, messages=[USER, choice["message"], USER], tools=[TOOL])
        assert response.status_code == 200, response.text
        [call] = choice["message"]["tool_calls"]
        written = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        assert written.startswith('"{')
        assert f"<tool_call>{written};user:Hi;" in prompt(api)


async def test_a_template_that_wants_objects_gets_arguments_that_are_none_in_one(
    tools_api: Serve, tokenizer: Tokenizer
) -> None:
    source = "{% for m in messages %}{% for call in m.tool_calls or [] %}{% for name, value in "
    source += "call.function.arguments | items %}{{ name }}={{ value }};{% endfor %}{% endfor %}{% endfor %}"
    cut = {"type": "function", "function": {"name": "f", "arguments": '{"b": '}}
    async with tools_api(saying("Yes", tokenizer)) as api:
        api.app.state.serving.tokenizer.chat_template = ChatTemplate(source, {})
        response = await api.post(CHAT, messages=[USER, {"role": "assistant", "tool_calls": [PAST, cut]}])
        assert response.status_code == 200, response.text
        assert prompt(api) == 'a=1;arguments={"b": ;'


async def test_tools_are_shown_to_the_model_unless_it_may_not_call_them(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with tools_api(saying(CALL, tokenizer)) as api:
        await api.post(CHAT, tools=[TOOL])
        assert prompt(api) == "[f]user:Hi;"
        grammar = api.engine.requests[-1].sampling.grammar
        assert grammar is not None
        assert grammar.kind == "structural_tag"
        [choice] = (await api.post(CHAT, tools=[TOOL], tool_choice="none")).json()["choices"]
        assert prompt(api) == "user:Hi;"
        assert api.engine.requests[-1].sampling.grammar is None
        assert choice["message"]["content"] == CALL
        assert "tool_calls" not in choice["message"]


async def test_past_calls_and_results_reach_the_template(tools_api: Serve, tokenizer: Tokenizer) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]}
    async with tools_api(saying("Yes", tokenizer)) as api:
        for content in ({"content": None}, {}, {"content": ""}):
            messages = [USER, {"role": "assistant", "tool_calls": [PAST], **content}, result]
            response = await api.post(CHAT, messages=messages)
            assert response.status_code == 200, response.text
            assert prompt(api) == 'user:Hi;assistant:<tool_call>{"a": 1};tool:42;'
        [choice] = response.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Yes", "stop")


async def test_thoughts_that_the_prompt_has_begun(tools_api: Serve, tokenizer: Tokenizer) -> None:
    async with tools_api(saying("Hm</think>Yes", tokenizer)) as api:
        begun = {"chat_template_kwargs": {"think": True}}
        [choice] = (await api.post(CHAT, **begun)).json()["choices"]
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm", "Yes")
        message = joined(await api.events(CHAT, **begun))
        assert (message["reasoning_content"], message["content"]) == ("Hm", "Yes")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools.0.function.parameters"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "tool"}]}, "messages.0.content"),
        ({"messages": [{**USER, "tool_calls": [PAST]}]}, "messages.0.tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
async def test_what_is_wrong_is_named(tools_api: Serve, tokenizer: Tokenizer, body: Any, param: str) -> None:
    async with tools_api(saying("Yes", tokenizer)) as api:
        response = await api.post(CHAT, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_model_without_tools_refuses_them(serve: Any, tokenizer: Tokenizer) -> None:
    async with serve(saying("Yes", tokenizer)) as api:
        assert (await api.post(CHAT, tools=[TOOL])).json()["error"]["param"] == "tools"
        past = [{"role": "assistant", "tool_calls": [PAST]}]
        assert (await api.post(CHAT, messages=past)).json()["error"]["param"] == "messages"
        assert (await api.post(CHAT, tools=[TOOL], tool_choice="none")).status_code == 200
