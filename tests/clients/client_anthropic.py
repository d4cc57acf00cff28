# requires: anthropic
"""anthropic, over /v1/messages."""

from __future__ import annotations

import sys
from typing import Any

from anthropic import Anthropic

QUESTION = [{"role": "user", "content": "Add 17 and 25."}]
JSON = [{"role": "user", "content": "Write the numbers of '17 and 25' as JSON with a and b."}]
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"name": "add", "description": "Add two numbers.", "input_schema": NUMBERS}


def main(base_url: str, model: str) -> None:
    """An answer and a call of a tool, whole and streamed, and the answer to the tool's result."""
    client = Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none")
    options: dict[str, Any] = {"model": model, "max_tokens": 100, "extra_body": {"temperature": 0}}
    answer = client.messages.create(messages=CAPITAL, **options).content[0].text
    assert "Paris" in answer, answer
    print("messages answer")
    with client.messages.stream(messages=CAPITAL, **options) as stream:
        assert "".join(stream.text_stream) == answer
    print("messages stream")
    tools = {"tools": [ADD], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    [call] = client.messages.create(messages=QUESTION, **tools, **options).content
    assert (call.name, call.input) == ("add", {"a": 17, "b": 25}), call
    print("messages call")
    with client.messages.stream(messages=QUESTION, **tools, **options) as stream:
        [streamed] = stream.get_final_message().content
    assert streamed.input == call.input, streamed
    print("messages call-stream")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
    told = [*QUESTION, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    none = {"tools": [ADD], "tool_choice": {"type": "none"}}
    assert "42" in client.messages.create(messages=told, **none, **options).content[0].text
    print("messages result")
    output = {"format": {"type": "json_schema", "schema": NUMBERS | {"additionalProperties": False}}}
    [block] = client.messages.create(messages=JSON, output_config=output, **options).content
    assert block.text.replace(" ", "") == '{"a":17,"b":25}', block
    print("messages schema")


if __name__ == "__main__":
    main(*sys.argv[1:])
