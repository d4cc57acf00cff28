# requires: litellm
"""litellm."""

from __future__ import annotations

import json
import sys
from typing import Any

from litellm import completion
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "Add 17 and 25."}]
JSON = [{"role": "user", "content": "Write the numbers of '17 and 25' as JSON with a and b."}]
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": NUMBERS}}


class Sum(BaseModel):
    """Two numbers to add."""

    a: int
    b: int


def main(base_url: str, model: str) -> None:
    """Its one function, with all that it passes on."""
    options: dict[str, Any] = {"model": f"openai/{model}", "api_base": base_url, "api_key": "none"}
    options |= {"temperature": 0, "max_tokens": 100}
    answer = completion(messages=CAPITAL, **options).choices[0].message.content
    assert "Paris" in answer, answer
    print("chat answer")
    streamed = [chunk.choices[0].delta.content or "" for chunk in completion(messages=CAPITAL, stream=True, **options)]
    assert "".join(streamed) == answer, streamed
    print("chat stream")
    with_tools = {"tools": [ADD], "tool_choice": "required", **options}
    message = completion(messages=QUESTION, parallel_tool_calls=False, **with_tools).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"a": 17, "b": 25}, call
    print("chat call")
    chunks = completion(messages=QUESTION, parallel_tool_calls=False, stream=True, **with_tools)
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments, parts
    print("chat call-stream")
    told = [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    assert "42" in completion(messages=told, **(with_tools | {"tool_choice": "none"})).choices[0].message.content
    print("chat result")
    written = completion(messages=JSON, response_format=Sum, **options).choices[0].message.content
    assert Sum.model_validate_json(written) == Sum(a=17, b=25), written
    print("chat schema")


if __name__ == "__main__":
    main(*sys.argv[1:])
