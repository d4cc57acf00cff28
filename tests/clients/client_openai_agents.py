# requires: openai-agents
"""openai-agents, the library behind agents of OpenAI's: a run with one call of a tool over /v1/responses."""

from __future__ import annotations

import asyncio
import sys

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

made: list[tuple[int, int]] = []


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    made.append((a, b))
    return a + b


async def main(base_url: str, model: str) -> None:
    """A call of a tool, whole and streamed, and an answer by an agent that is handed the conversation."""
    set_tracing_disabled(True)
    responses = OpenAIResponsesModel(model, AsyncOpenAI(base_url=base_url, api_key="none"))
    settings = ModelSettings(temperature=0, max_tokens=100, tool_choice="required", parallel_tool_calls=False)
    calculator = Agent(
        "Calculator", model=responses, model_settings=settings, tools=[add], tool_use_behavior="stop_on_first_tool"
    )
    whole = await Runner.run(calculator, "Add 17 and 25.")
    streamed = Runner.run_streamed(calculator, "Add 17 and 25.")
    async for _ in streamed.stream_events():
        pass
    assert (whole.final_output, streamed.final_output) == ("42", "42"), (whole, streamed)
    assert made == [(17, 25)] * 2, made
    print("responses call\nresponses call-stream")
    speaker = Agent("Speaker", model=responses, model_settings=ModelSettings(temperature=0, max_tokens=100))
    answer = await Runner.run(speaker, whole.to_input_list())
    assert "42" in answer.final_output, answer
    print("responses result")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
