"""A model whose chat template knows tools and thoughts, and engines that say a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.text.tokenizer import Tokenizer
from tests.integration.running_api import Api
from tests.integration.scripted_engine import Script

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}{% endfor %};{% endfor %}"
    "{% if think %}<think>{% endif %}{# </think> #}"
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"ä": 1}}\n</tool_call>'
THOUGHT = f"<think>\nHm\n</think>\n\nTwo:\n{CALL}\n{CALL}"

Serve = Callable[..., AbstractAsyncContextManager[Api]]


def prompt(api: Api) -> str:
    """What the last request asked the engine."""
    return api.tokenizer.decode(api.engine.requests[-1].prompt_token_ids)


def saying(text: str, tokenizer: Tokenizer, finish_reason: Any = "stop", tokens: int = 1, stop: Any = None) -> Script:
    """A script that says a text, so many tokens a step."""
    ids = tokenizer.encode(text, add_special_tokens=False)

    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        for begin in range(0, len(ids), tokens):
            is_last = begin + tokens >= len(ids)
            yield EngineOutput(
                request_id=request.request_id,
                token_ids=ids[begin : begin + tokens],
                finish_reason=finish_reason if is_last else None,
                stop_reason=stop if is_last else None,
            )

    return script
