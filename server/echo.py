"""The prompts that are put in front of their completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.text.tokenizer import Tokenizer
from server.errors import bad_request
from server.params import TokenizedPrompt

MAX_ECHO = 16 * 1024**2
"""Bytes in front of all completions of a request: of a prompt they are written once for each choice."""


def with_echo(prompts: Sequence[TokenizedPrompt], n: int, tokenizer: Tokenizer) -> list[TokenizedPrompt]:
    """The prompts, each with its text to be put in front of its ``n`` choices; 400 for more than ``MAX_ECHO`` of it."""
    echoing, num_bytes = [], 0
    for prompt in prompts:
        echo = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
        num_bytes += n * len(echo.encode())
        if num_bytes > MAX_ECHO:
            raise bad_request(
                f"The prompts in front of all completions are more than {MAX_ECHO} bytes: ask for fewer prompts "
                "at once, a smaller n, or no echo.",
                "echo",
            )
        echoing.append(replace(prompt, echo=echo))
    return echoing
