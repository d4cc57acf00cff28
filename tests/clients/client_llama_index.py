# requires: llama-index-llms-openai-like
"""llama-index, which makes a tool's schema of its annotations, so that they must not be text here."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

QUESTION = ChatMessage("Add 17 and 25.")
CAPITAL = ChatMessage("What is the capital of France? Answer in one sentence.")


class Sum(BaseModel):
    """Two numbers to add."""

    a: int
    b: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def main(base_url: str, model: str) -> None:
    """Its class for servers that speak OpenAI's API."""
    llm = OpenAILike(
        model=model,
        api_base=base_url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=100,
    )
    answer = llm.chat([CAPITAL]).message.content
    assert "Paris" in answer, answer
    print("chat answer")
    assert "".join(part.delta or "" for part in llm.stream_chat([CAPITAL])) == answer
    print("chat stream")
    tool = FunctionTool.from_defaults(add)
    called = llm.chat_with_tools([tool], chat_history=[QUESTION], tool_required=True)
    [call] = llm.get_tool_calls_from_response(called)
    assert call.tool_kwargs == {"a": 17, "b": 25}, call
    print("chat call")
    *_, last = llm.stream_chat_with_tools([tool], chat_history=[QUESTION], tool_required=True)
    [streamed] = llm.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs, streamed
    print("chat call-stream")
    result = ChatMessage("42", role="tool", additional_kwargs={"tool_call_id": call.tool_id})
    told = llm.chat([QUESTION, called.message, result]).message.content
    assert "42" in told, told
    print("chat result")
    assert llm.as_structured_llm(Sum).chat([QUESTION]).raw == Sum(a=17, b=25)
    print("chat schema")


if __name__ == "__main__":
    main(*sys.argv[1:])
