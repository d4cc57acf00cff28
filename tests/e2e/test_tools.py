"""Tools through the real ``openai`` and ``anthropic`` clients with Qwen2.5-Coder-0.5B, by all APIs that have
them: whole and streamed, with drafts on and off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.running_server import AT_ONCE, SMALL, RunningServer

MODEL = "qwen2.5-coder-0.5b"


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("get_weather", "The weather in a city now", city="string"),
    tool("add", "Add two numbers", a="integer", b="integer"),
    tool("read_file", "Read a file", path="string"),
]
TASKS = [
    ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
    ("What is 17 plus 25?", "add", {"a": 17, "b": 25}),
    ("Show me the file /etc/hosts.", "read_file", {"path": "/etc/hosts"}),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    options = ["--model", MODEL, *SMALL, *AT_ONCE]
    server = RunningServer(tmp_path_factory.mktemp("qwen") / "log.jsonl", options)
    try:
        server.wait_until_healthy()
        http = openai.DefaultHttpxClient(trust_env=False, timeout=120)
        yield openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", http_client=http)
    finally:
        server.stop()


def asked(question: str, choice: Any, **more: Any) -> dict[str, Any]:
    """The arguments of a greedy request."""
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "tools": TOOLS, "tool_choice": choice, "temperature": 0} | more


def test_a_gap_is_filled(client: openai.OpenAI) -> None:
    before, after = "def total(prices):\n    result = 0\n    for price in prices:\n        ", "\n    return result\n"
    answer = client.completions.create(model=MODEL, prompt=before, suffix=after, temperature=0, stop="\n")
    assert answer.choices[0].text == "result += price"


def streamed(client: openai.OpenAI, **arguments: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """Text, calls (name and arguments) and finish reason, joined from the deltas of a stream."""
    text, calls, finish_reason = "", list[list[str]](), None
    for chunk in client.chat.completions.create(**arguments, stream=True):
        [choice] = chunk.choices
        text, finish_reason = text + (choice.delta.content or ""), choice.finish_reason
        for part in choice.delta.tool_calls or []:
            if part.id:
                calls.append([part.function.name, ""])
            calls[part.index][1] += part.function.arguments or ""
    return text, [(name, arguments) for name, arguments in calls], finish_reason


@pytest.mark.parametrize(
    ("question", "name", "expected", "by_name"), [*((*task, False) for task in TASKS), (*TASKS[1], True)]
)
def test_three_tasks(client: openai.OpenAI, question: str, name: str, expected: dict[str, Any], by_name: bool) -> None:
    choice = {"type": "function", "function": {"name": name}} if by_name else "required"
    arguments = asked(question, choice, max_tokens=60, parallel_tool_calls=False)
    [whole] = client.chat.completions.create(**arguments).choices
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    [call] = whole.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (name, expected)
    without_drafts = {"extra_body": {"num_speculative_tokens": 0}} if by_name else {}
    again = streamed(client, **arguments, **without_drafts)
    assert again == ("", [(name, call.function.arguments)], "tool_calls")


def test_the_result_of_a_call_is_answered(client: openai.OpenAI) -> None:
    arguments = asked(TASKS[1][0], "required", parallel_tool_calls=False)
    message = client.chat.completions.create(**arguments).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}
    arguments["messages"] += [message.model_dump(), result]
    answer = client.chat.completions.create(**arguments | {"tool_choice": "none", "max_tokens": 40}).choices[0]
    assert "42" in (answer.message.content or "")


def test_the_model_may_answer_in_words(client: openai.OpenAI) -> None:
    arguments = asked("Who are you? Answer in one sentence.", "auto", max_tokens=40)
    choice = client.chat.completions.create(**arguments).choices[0]
    assert choice.message.tool_calls is None
    assert streamed(client, **arguments) == (choice.message.content, [], choice.finish_reason)


def test_the_client_parses_calls_of_strict_tools(client: openai.OpenAI) -> None:
    strict = json.loads(json.dumps(TOOLS[1]))
    strict["function"] |= {"strict": True}
    strict["function"]["parameters"] |= {"additionalProperties": False}
    answer: Any = client.chat.completions.parse(**asked(TASKS[1][0], "required", max_tokens=60) | {"tools": [strict]})
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == {"a": 17, "b": 25}


def test_the_responses_api(client: openai.OpenAI) -> None:
    question, name, expected = TASKS[1]
    tools: Any = [{"type": "function", "strict": False, **each["function"]} for each in TOOLS]
    arguments: dict[str, Any] = {"model": MODEL, "tools": tools, "temperature": 0, "max_output_tokens": 60}
    first = client.responses.create(**arguments, input=question, tool_choice="required", parallel_tool_calls=False)
    [call] = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == (name, expected)
    named: Any = {"type": "function", "name": name}
    with client.responses.stream(**arguments, input=question, tool_choice=named) as stream:
        again: Any = stream.get_final_response().output[0]
    assert (again.name, again.arguments) == (name, call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    goes_on = client.responses.create(
        **arguments, input=[result], previous_response_id=first.id, tool_choice="none", store=False
    )
    assert "42" in goes_on.output_text
    stateless: list[Any] = [{"role": "user", "content": question}, call, result]
    same = client.responses.create(**arguments, input=stateless, tool_choice="none", store=False)
    assert same.output_text == goes_on.output_text


def test_the_messages_api(client: openai.OpenAI) -> None:
    question, name, expected = TASKS[1]
    http = anthropic.DefaultHttpxClient(trust_env=False, timeout=120)
    url = str(client.base_url).removesuffix("/v1/")
    claude = anthropic.Anthropic(base_url=url, api_key="none", http_client=http)
    functions = [each["function"] for each in TOOLS]
    tools: Any = [
        {"name": each["name"], "description": each["description"], "input_schema": each["parameters"]}
        for each in functions
    ]
    messages: list[Any] = [{"role": "user", "content": question}]
    greedy: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "tools": tools, "extra_body": {"temperature": 0}}
    one_call: Any = {"type": "any", "disable_parallel_tool_use": True}
    whole = claude.messages.create(**greedy, messages=messages, tool_choice=one_call)
    [call] = whole.content
    assert call.type == "tool_use"
    assert (call.name, call.input, whole.stop_reason) == (name, expected, "tool_use")
    with claude.messages.stream(**greedy, messages=messages, tool_choice={"type": "tool", "name": name}) as stream:
        [again] = stream.get_final_message().content
    assert again.type == "tool_use"
    assert again.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
    messages += [{"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(**greedy, messages=messages, tool_choice={"type": "none"})
    counted = claude.messages.count_tokens(model=MODEL, messages=messages, tools=tools, tool_choice={"type": "none"})
    with claude.messages.stream(**greedy, messages=messages, tool_choice={"type": "none"}) as stream:
        text = "".join(stream.text_stream)
    [part] = answer.content
    assert part.type == "text"
    assert text == part.text
    assert "42" in text
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
