# requires: instructor anthropic
"""instructor: all modes that it has for these APIs, of which others are names, but for two. ``PARALLEL_TOOLS`` leaves
it to the model whether it calls a tool. ``JSON_SCHEMA`` over messages sends no schema by today's SDK, asks for JSON in
words, and refuses the fence that the model puts around it."""

from __future__ import annotations

import sys
from typing import Any

import anthropic
import instructor
import openai
from instructor import Mode
from pydantic import BaseModel


class Sum(BaseModel):
    """Two numbers to add."""

    a: int
    b: int


def main(base_url: str, model: str) -> None:
    """Ask once in each mode."""
    chat = openai.OpenAI(base_url=base_url, api_key="none")
    messages = anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none")
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 100}

    def ask(client: Any, **options: Any) -> None:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Add 17 and 25."}],
            response_model=Sum,
            max_retries=0,
            **options,
        )
        assert (answer.a, answer.b) == (17, 25), (client.mode, answer)

    ask(instructor.from_openai(chat, mode=Mode.TOOLS), **greedy)
    print("chat call")
    for mode in (Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON):
        ask(instructor.from_openai(chat, mode=mode), **greedy)
    print("chat schema")
    ask(instructor.from_openai(chat, mode=Mode.RESPONSES_TOOLS), temperature=0, max_output_tokens=100)
    print("responses call")
    greedy = {"max_tokens": 100, "extra_body": {"temperature": 0}}  # new SDKs know no temperature
    ask(instructor.from_anthropic(messages, mode=Mode.TOOLS), **greedy)
    print("messages call")
    ask(instructor.from_anthropic(messages, mode=Mode.JSON), **greedy)
    print("messages schema")


if __name__ == "__main__":
    main(*sys.argv[1:])
