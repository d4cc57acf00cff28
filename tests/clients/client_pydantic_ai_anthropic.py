# requires: pydantic-ai-slim[anthropic]
"""pydantic-ai over /v1/messages: an agent that calls a tool and has to give its answer by a call of another."""

from __future__ import annotations

import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider


class Sum(BaseModel):
    """Two numbers to add."""

    a: int
    b: int


def main(base_url: str, model: str) -> None:
    """Ask once, whole and streamed."""
    provider = AnthropicProvider(base_url=base_url.removesuffix("/v1"), api_key="none")
    agent = Agent(AnthropicModel(model, provider=provider), output_type=Sum, model_settings={"max_tokens": 100})
    whole = agent.run_sync("Add 17 and 25.").output
    assert whole == Sum(a=17, b=25), whole
    print("messages call")
    streamed = agent.run_stream_sync("Add 17 and 25.").get_output()
    assert streamed == whole, streamed
    print("messages call-stream")


if __name__ == "__main__":
    main(*sys.argv[1:])
