# requires: pydantic-ai-slim[openai]
"""pydantic-ai: an agent that has to give its answer by a call of a tool."""

from __future__ import annotations

import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Sum(BaseModel):
    """Two numbers to add."""

    a: int
    b: int


def main(base_url: str, model: str) -> None:
    """Ask once, whole and streamed."""
    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=base_url, api_key="none"))
    agent = Agent(chat, output_type=Sum, model_settings={"temperature": 0, "max_tokens": 100})
    whole = agent.run_sync("Add 17 and 25.").output
    assert whole == Sum(a=17, b=25), whole
    print("chat call")
    streamed = agent.run_stream_sync("Add 17 and 25.").get_output()
    assert streamed == whole, streamed
    print("chat call-stream")


if __name__ == "__main__":
    main(*sys.argv[1:])
