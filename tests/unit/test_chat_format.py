"""What chat templates say about answers; the templates are those of real models, cut to what matters."""

from __future__ import annotations

import pytest

from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.tools.chat_format import HERMES, LLAMA, CallFormat, ChatFormat
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

QWEN = (
    "{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    r"""{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}"""
    "{%- endif %}"
)
QWEN_CODER = "{% for tool in tools %}{% endfor %}<tool_call>\n<function=example>\n{{ tool_call.arguments }}"
LLAMA_3 = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- if tools is not none %}"
    """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and value}.' }}"""
    "{%- endif %}"
)


@pytest.mark.parametrize(
    ("template", "calls", "thinks"),
    [
        (None, None, False),
        ("{{ messages[0].content }}", None, False),
        (QWEN, HERMES, False),
        (QWEN + "{{ content.split('</think>') }}{% if on %}<think>{% endif %}", HERMES, True),
        (QWEN.replace("tools", "xml_tools"), None, False),
        (QWEN_CODER, None, False),
        (LLAMA_3, LLAMA, False),
        ("{% for tool in tools %}{% endfor %}[TOOL_CALLS]", None, False),
    ],
)
def test_the_format_is_known_by_the_template(template: str | None, calls: CallFormat | None, thinks: bool) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), VOCAB_SIZE, None, (), template)
    assert ChatFormat.of(tokenizer) == ChatFormat(calls, thinks)


@pytest.mark.parametrize(
    ("prompt", "is_thinking"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("assistant\n", False)]
)
def test_a_prompt_has_begun_the_thoughts(prompt: str, is_thinking: bool) -> None:
    assert ChatFormat(HERMES, thinks=True).is_thinking(prompt) == is_thinking
    assert not ChatFormat(HERMES, thinks=False).is_thinking(prompt)
