# requires: instructor
"""instructor: its modes that call tools."""

from __future__ import annotations

import sys

import instructor
import openai
from pydantic import BaseModel


class Sum(BaseModel):
    """Two numbers to add."""

    a: int
    b: int


def main(base_url: str, model: str) -> None:
    """Ask once in each mode. ``PARALLEL_TOOLS`` leaves the choice to the model, which no server can answer for."""
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
        client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=mode)
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Add 17 and 25."}],
            response_model=Sum,
            temperature=0,
            max_tokens=100,
            max_retries=0,
        )
        assert (answer.a, answer.b) == (17, 25), (mode, answer)
    print("chat call")


if __name__ == "__main__":
    main(*sys.argv[1:])
