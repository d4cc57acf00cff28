# requires: langchain-openai
"""langchain: ``bind_tools``, whole and streamed, and the answer to a tool's result."""

from __future__ import annotations

import sys

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def main(base_url: str, model: str) -> None:
    """Ask for a call, make it, and ask again with its result."""
    chat = ChatOpenAI(model=model, base_url=base_url, api_key="none", temperature=0, max_tokens=100)
    with_tools = chat.bind_tools([add], tool_choice="required", parallel_tool_calls=False)
    question = HumanMessage("Add 17 and 25.")
    whole = with_tools.invoke([question])
    assert isinstance(whole, AIMessage)
    [call] = whole.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 17, "b": 25}), call
    print("chat call")
    streamed = None
    for chunk in with_tools.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [one["args"] for one in streamed.tool_calls] == [call["args"]], streamed
    print("chat call-stream")
    result = ToolMessage(add.invoke(call).content, tool_call_id=call["id"])
    answer = chat.bind_tools([add], tool_choice="none").invoke([question, whole, result])
    assert "42" in answer.content, answer
    print("chat result")


if __name__ == "__main__":
    main(*sys.argv[1:])
