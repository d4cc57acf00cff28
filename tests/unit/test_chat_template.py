"""Chat templates: what they are offered and what they render, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.text.chat_template import ChatTemplateError
from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_directory

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>1 & 2</b>?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Sure? 東京"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_renders_as_transformers_does(smollm2_path: Path, add_generation_prompt: bool) -> None:
    smollm2 = Tokenizer.from_files(ModelFiles("smollm2", smollm2_path, "gguf"))
    assert smollm2.chat_template is not None
    reference = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=smollm2.backend, chat_template=smollm2.chat_template.source
    )
    for messages in (CHAT, CHAT[1:2]):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert smollm2.apply_chat_template(messages, add_generation_prompt) == expected


RICH_TEMPLATE = """\
{%- if tools %}{% for tool in tools %}
    {{- tool | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {{ bos_token }}{{ message.role }}: {{ message.content | trim }}{{ message.name | default("-") }}
{% endfor %}"""


def test_template_features_are_those_of_transformers(tiny: ModelFiles, tmp_path: Path) -> None:
    """Whitespace control, unescaped JSON, loop controls, absent entries, token names."""
    tokenizer = with_template(tiny, tmp_path, RICH_TEMPLATE)
    reference = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer.backend, chat_template=RICH_TEMPLATE, bos_token="<|endoftext|>"
    )
    messages: list[dict[str, Any]] = [
        *CHAT,
        {"role": "tool", "content": "hidden"},
        {"role": "user", "content": " padded ", "name": None},
    ]
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f<é>", "parameters": {}}}]
    expected = reference.apply_chat_template(messages, tools=[*tools], tokenize=False)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False, tools=tools) == expected
    assert "f<é>" in expected


GENERATION_TEMPLATE = """\
{%- set said = "nothing" %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- generation %}{% set said = message.content %}{{ said }}<|im_end|>
        {% endgeneration %}
    {%- else %}
        {{- message.content }}
        {%- if loop.index == 2 %}{% continue %}{% endif %}
    {%- endif %}
    {{- said }}
{% endfor %}"""
OFFERED_TEMPLATE = """\
{{ messages | tojson(indent=2, separators=(",", " = "), sort_keys=True, ensure_ascii=True) }}
{%- if documents is not none %}documents{% endif %}
{%- for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}
{{ strftime_now("%Y") }}"""


@pytest.mark.parametrize("template", [GENERATION_TEMPLATE, OFFERED_TEMPLATE])
def test_templates_are_offered_what_transformers_offers(template: str, tiny: ModelFiles, tmp_path: Path) -> None:
    tokenizer = with_template(tiny, tmp_path, template)
    reference = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer.backend, chat_template=template
    )
    expected = reference.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=False) == expected


def with_template(tiny: ModelFiles, directory: Path, template: str | None) -> Tokenizer:
    """The tiny model's tokenizer with another chat template, or none."""
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_bytes((tiny.path / name).read_bytes())
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return Tokenizer.from_files(ModelFiles("other", directory, "safetensors"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render these messages"),
        ("{{ messages.append(1) }}", "cannot render these messages"),
        ("{{ messages.__class__.__mro__ }}", "cannot render these messages"),
        ("{% for i in range(10000000) %}{% endfor %}", "cannot render these messages"),
    ],
)
def test_template_that_cannot_render_is_a_clear_error(
    template: str | None, reason: str, tiny: ModelFiles, tmp_path: Path
) -> None:
    tokenizer = with_template(tiny, tmp_path, template)
    with pytest.raises(ChatTemplateError, match=reason):
        tokenizer.apply_chat_template(CHAT)


def test_messages_are_texts_alone_without_a_template(tiny: ModelFiles, tmp_path: Path) -> None:
    tokenizer = with_template(tiny, tmp_path, None)
    texts = "".join(f"{message['content']}\n\n" for message in CHAT)
    assert tokenizer.encode_messages(CHAT) == tokenizer.encode(texts)


@pytest.mark.parametrize(
    "template", ["{% for %}", *("{% for m in messages %}" * depth + "{% endfor %}" * depth for depth in (30, 5000))]
)
def test_invalid_template_is_refused_at_load(template: str, tiny: ModelFiles, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="chat template is invalid"):
        with_template(tiny, tmp_path, template)


def test_template_that_is_no_text_is_refused_at_load(tiny: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: cannot be read"):
        with_template(tiny, tmp_path, None)


def test_named_templates_use_the_default_one(tiny: ModelFiles, tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert with_template(tiny, tmp_path, None).apply_chat_template(CHAT) == "plain"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, "<|endoftext|> <|im_end|> none"),
        ({"bos_token": "<s>", "eos_token": {"content": "<|im_start|>", "special": True}}, "<s> <|im_start|> none"),
        ({"bos_token": None, "pad_token": "<|pad|>"}, " <|im_end|> <|pad|>"),
    ],
)
def test_tokens_are_those_that_the_tokenizer_names(
    named: dict[str, Any], expected: str, tiny: ModelFiles, tmp_path: Path
) -> None:
    """Else they are those of the model's ids."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = with_template(tiny, tmp_path, "{{ bos_token }} {{ eos_token }} {{ pad_token | default('none') }}")
    assert tokenizer.apply_chat_template(CHAT) == expected


def test_a_token_that_is_none_is_named(tiny: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": 1}))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: bos_token is 1, must be a string"):
        with_template(tiny, tmp_path, "{{ bos_token }}")
