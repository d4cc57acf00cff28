# requires: openai
"""openai for Python, over /v1/chat/completions and /v1/responses."""

from __future__ import annotations

import json
import sys
from typing import Any

from openai import OpenAI
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "Add 17 and 25."}]
JSON = [{"role": "user", "content": "Write the numbers of '17 and 25' as JSON with a and b."}]
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"name": "add", "description": "Add two numbers.", "parameters": NUMBERS}


class Sum(BaseModel):
    """Two numbers to add."""

    a: int
    b: int


def chat(client: OpenAI, options: dict[str, Any]) -> None:
    """By the chat API."""
    create = client.chat.completions.create
    answer = create(messages=CAPITAL, **options).choices[0].message.content
    assert "Paris" in answer, answer
    print("chat answer")
    streamed = [chunk.choices[0].delta.content or "" for chunk in create(messages=CAPITAL, stream=True, **options)]
    assert "".join(streamed) == answer, streamed
    print("chat stream")
    with_tools: dict[str, Any] = {
        "tools": [{"type": "function", "function": ADD}],
        "tool_choice": "required",
        **options,
    }
    message = create(messages=QUESTION, parallel_tool_calls=False, **with_tools).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"a": 17, "b": 25}, call
    print("chat call")
    with client.chat.completions.stream(messages=QUESTION, parallel_tool_calls=False, **with_tools) as stream:
        [streamed_call] = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed_call.function.arguments == call.function.arguments, streamed_call
    print("chat call-stream")
    told = [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    assert "42" in create(messages=told, **(with_tools | {"tool_choice": "none"})).choices[0].message.content
    print("chat result")
    parsed = client.chat.completions.parse(messages=JSON, response_format=Sum, **options)
    assert parsed.choices[0].message.parsed == Sum(a=17, b=25), parsed
    print("chat schema")


def responses(client: OpenAI, options: dict[str, Any]) -> None:
    """By the responses API."""
    create = client.responses.create
    answer = create(input=CAPITAL, **options).output_text
    assert "Paris" in answer, answer
    print("responses answer")
    events = list(create(input=CAPITAL, stream=True, **options))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer, events
    print("responses stream")
    with_tools: dict[str, Any] = {"tools": [{"type": "function", **ADD}], "tool_choice": "required", **options}
    [call] = create(input=QUESTION, parallel_tool_calls=False, **with_tools).output
    assert json.loads(call.arguments) == {"a": 17, "b": 25}, call
    print("responses call")
    with client.responses.stream(input=QUESTION, parallel_tool_calls=False, **with_tools) as stream:
        [streamed_call] = stream.get_final_response().output
    assert streamed_call.arguments == call.arguments, streamed_call
    print("responses call-stream")
    told = [*QUESTION, call, {"type": "function_call_output", "call_id": call.call_id, "output": "42"}]
    assert "42" in create(input=told, **(with_tools | {"tool_choice": "none"})).output_text
    print("responses result")
    parsed = client.responses.parse(input=JSON, text_format=Sum, **options)
    assert parsed.output_parsed == Sum(a=17, b=25), parsed
    print("responses schema")


if __name__ == "__main__":
    openai_client = OpenAI(base_url=sys.argv[1], api_key="none")
    greedy = {"model": sys.argv[2], "temperature": 0}
    chat(openai_client, greedy | {"max_tokens": 100})
    responses(openai_client, greedy | {"max_output_tokens": 100})
