"""Fields of request bodies that other servers know: which are ignored, which are refused, and which reach the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from evospec.server.params import to_sampling_params
from evospec.server.schemas.body import Leniency
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.schemas.completions import CompletionRequest
from tests.unit.test_schemas import CHAT, SERVING, TEXT, error_of

HARMLESS = [
    {"store": True},
    {"service_tier": "flex"},
    {"verbosity": "low"},
    {"chat_id": {"any": ["thing"]}},
    {"stream_options": {"other": 1}},
    {"messages": [{"role": "user", "content": "x", "timestamp": 5}]},
    {"messages": [{"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
]


@pytest.mark.parametrize("fields", HARMLESS)
def test_what_cannot_change_an_answer_is_ignored_and_named_or_refused_if_strict(fields: dict[str, Any]) -> None:
    leniency = Leniency()
    ChatCompletionRequest.model_validate({**CHAT, **fields}, context=leniency)
    *_, name = list(_names(fields))
    assert list(leniency.ignored) == [name]
    error = error_of(ChatCompletionRequest, {**CHAT, **fields}, strict=True)
    assert (error.status, error.code) == (400, "unsupported_parameter")
    assert (error.param or "").endswith(name)


def _names(value: Any) -> Iterator[str]:
    """Of fields with something in them, down to the last one that no body knows."""
    for name, inner in value.items() if isinstance(value, dict) else []:
        yield name
        if name in ("stream_options", "messages", "content"):
            yield from _names(inner[0] if isinstance(inner, list) else inner)


@pytest.mark.parametrize(
    ("body", "param", "meant"),
    [
        ({**CHAT, "temprature": 0}, "temprature", "temperature"),
        ({**CHAT, "max_token": 5}, "max_token", "max_tokens"),
        ({**CHAT, "max_new_tokens": 5}, "max_new_tokens", "max_tokens"),
        ({**CHAT, "stop_sequences": ["x"]}, "stop_sequences", "stop"),
        ({**CHAT, "messages": [{"role": "user", "content": "x", "names": "y"}]}, "messages.0.names", "name"),
    ],
)
def test_another_name_of_a_field_is_refused_with_the_right_one(body: Any, param: str, meant: str) -> None:
    error = error_of(ChatCompletionRequest, body)
    assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")
    assert f"did you mean {meant}?" in error.message


def test_no_message_may_be_for_the_answer_to_go_on_with() -> None:
    message = {"role": "assistant", "content": "x"}
    ChatCompletionRequest.model_validate({**CHAT, "messages": [{**message, "prefix": False}]})
    assert (
        error_of(ChatCompletionRequest, {**CHAT, "messages": [{**message, "prefix": True}]}).param
        == "messages.0.prefix"
    )


def test_what_the_chat_template_may_want_reaches_it() -> None:
    body = ChatCompletionRequest.model_validate(
        {
            **CHAT,
            "messages": [{"role": "assistant", "content": "x", "name": "Ann", "reasoning_content": "so"}],
            "reasoning_effort": "high",
            "chat_template_kwargs": {"enable_thinking": False},
        }
    )
    told = {name: value for name, value in body.messages[0].for_template().items() if value is not None}
    assert told == {"role": "assistant", "content": "x", "name": "Ann", "reasoning_content": "so"}
    assert body.template_variables() == {"reasoning_effort": "high", "enable_thinking": False}


@pytest.mark.parametrize("variables", [{"messages": []}, {"bos_token": "x"}, {str(i): i for i in range(40)}, []])
def test_template_variables_are_few_and_none_of_the_servers_own(variables: Any) -> None:
    assert error_of(ChatCompletionRequest, {**CHAT, "chat_template_kwargs": variables}).param == "chat_template_kwargs"


def test_top_p_0_keeps_the_most_likely_token() -> None:
    body = CompletionRequest.model_validate({**TEXT, "top_p": 0, "top_k": 7})
    sampling = to_sampling_params(body, 9, SERVING, logprobs=None)
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_a_name_that_only_resembles_a_field_is_of_another_server() -> None:
    leniency = Leniency()
    ChatCompletionRequest.model_validate({**CHAT, "top_n": 5, "x" * 5000: 1}, context=leniency)
    assert list(leniency.ignored) == ["top_n", "x" * 5000]
