"""Validation of request bodies: what is refused, how the field is named, what passes through."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evospec.engine.messages import Grammar
from evospec.engine.models.sampling_defaults import SamplingDefaults
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.anthropic.request import MessagesRequest
from evospec.server.errors import ApiError, body_error, validation_error
from evospec.server.params import to_sampling_params, tokenize_prompts
from evospec.server.responses.request import ResponsesRequest
from evospec.server.routes.tokens import DetokenizeRequest, TokenizeRequest
from evospec.server.schemas.body import Leniency
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.schemas.completions import CompletionRequest
from evospec.server.schemas.constraints import to_grammar
from evospec.server.schemas.unsupported import UNSUPPORTED
from evospec.server.work_shares import RequestWork, WorkShares
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

TEXT = {"model": "m", "prompt": "x"}
OTHERS = SamplingDefaults(temperature=0.3, top_p=0.4, top_k=5, min_p=0.6, repetition_penalty=1.5)
SERVING: Any = SimpleNamespace(sampling_defaults=OTHERS, engine_info=SimpleNamespace(vocab_size=10))
ONE = {"role": "user", "content": "x"}
CHAT = {"model": "m", "messages": [ONE]}


def error_of(model: Any, body: dict[str, Any], strict: bool = False) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body, context=Leniency(strict))
    return body_error(caught.value, body)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, float("nan"), float("inf"), "1", True, 10**400]),
        ("top_p", [-0.1, 1.01]),
        ("top_k", [-2, 2**31, 1.5]),
        ("min_p", [-0.1, 1.1]),
        ("seed", [2**63, -(2**63) - 1, 10**400, 1.5]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, 11, float("inf")]),
        ("stop", [5, "", ["a"] * 17, "a" * 257]),
        ("stop_token_ids", [[2**31], "a", [1] * 129]),
        ("n", [0, 17]),
        ("max_tokens", [-1, 2**31, "5"]),
        ("min_tokens", [-1]),
        ("logit_bias", [[1], {str(i): 1 for i in range(1025)}]),
        ("ignore_eos", [1, "true"]),
        ("response_format", [{"type": "xml"}, "json_object"]),
        ("stream", [1]),
        ("user", [5]),
    ],
)
@pytest.mark.parametrize(("model", "base"), [(CompletionRequest, TEXT), (ChatCompletionRequest, CHAT)])
def test_values_out_of_range_or_of_the_wrong_type_are_refused(
    model: Any, base: dict[str, Any], field: str, values: list[Any]
) -> None:
    for value in values:
        error = error_of(model, {**base, field: value})
        assert error.status == 400
        assert (error.param or "").split(".")[0] == field, value


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (CompletionRequest, {**TEXT, "stop": ["a", 5]}, "stop.1"),
        (CompletionRequest, {**TEXT, "prompt": []}, "prompt"),
        (CompletionRequest, {**TEXT, "prompt": {}}, "prompt"),
        (CompletionRequest, {**TEXT, "prompt": [[]]}, "prompt"),
        (CompletionRequest, {**TEXT, "prompt": [[1, -2]]}, "prompt.0.1"),
        (CompletionRequest, {**TEXT, "prompt": [True]}, "prompt"),
        (CompletionRequest, {**TEXT, "logprobs": 21}, "logprobs"),
        (CompletionRequest, {**TEXT, "max_tokens": 0}, "max_tokens"),
        (CompletionRequest, {**TEXT, "logit_bias": {"5": 101}}, "logit_bias.5"),
        (CompletionRequest, {"prompt": "x"}, "model"),
        (ChatCompletionRequest, {**CHAT, "messages": []}, "messages"),
        (ChatCompletionRequest, {**CHAT, "messages": [{"role": "user"}]}, "messages.0.content"),
        (ChatCompletionRequest, {**CHAT, "messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        (ChatCompletionRequest, {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        (ChatCompletionRequest, {**CHAT, "max_tokens": 0}, "max_tokens"),
        (ChatCompletionRequest, {**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (CompletionRequest, {**TEXT, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (
            ChatCompletionRequest,
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
        ),
        (
            ChatCompletionRequest,
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 3}}},
            "response_format.json_schema.schema",
        ),
        (
            ChatCompletionRequest,
            {**CHAT, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
    ],
)
def test_the_error_names_the_place(model: Any, body: dict[str, Any], param: str) -> None:
    error = error_of(model, body)
    assert (error.status, error.param) == (400, param)


def test_a_message_is_about_one_place() -> None:
    error = error_of(CompletionRequest, {**TEXT, "n": 0, "stop": ["a", 5]})
    assert error.param == "stop.1"
    assert error.message == "stop.1: Input should be a valid string"


@pytest.mark.parametrize("prompt", [["a"] * 1025, [[1]] * 1025])
def test_too_many_prompts_are_a_clear_error(prompt: Any) -> None:
    error = error_of(CompletionRequest, {**TEXT, "prompt": prompt})
    assert error.message == "prompt: must be at most 1024 at once, not 1025"


@pytest.mark.parametrize(
    ("field", "asks", "no_op"),
    [
        ("functions", [{}], []),
        ("function_call", {"name": "f"}, "none"),
        ("audio", {"voice": "alloy"}, None),
        ("modalities", ["text", "audio"], ["text"]),
        ("web_search_options", {}, None),
        *((name, "something", next(iter(values), None)) for name, values in UNSUPPORTED.items()),
    ],
)
def test_unsupported_fields_pass_only_when_they_ask_for_nothing(field: str, asks: Any, no_op: Any) -> None:
    error = error_of(ChatCompletionRequest, {**CHAT, field: asks})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    ChatCompletionRequest.model_validate({**CHAT, field: no_op})
    ChatCompletionRequest.model_validate({**CHAT, field: None})


OTHER_APIS = (
    (ResponsesRequest, {"model": "m", "input": "x"}),
    (MessagesRequest, {"model": "m", "max_tokens": 9, "messages": [ONE]}),
)
OF_CHAT_ALONE: tuple[tuple[str, Any, Any], ...] = (
    ("n", 2, 1),
    ("presence_penalty", 0.5, 0),
    ("frequency_penalty", 0.5, 0.0),
    ("repetition_penalty", 1.1, 1.0),
    ("logit_bias", {"5": 1}, {}),
    ("logprobs", True, False),
    ("min_tokens", 1, 0),
    ("ignore_eos", True, False),
    ("functions", [{}], []),
)


@pytest.mark.parametrize(
    ("model", "base", "field", "asks", "no_op"),
    [
        (CompletionRequest, TEXT, "tools", [{"type": "function", "function": {"name": "f"}}], []),
        (CompletionRequest, TEXT, "tool_choice", "required", "auto"),
        (CompletionRequest, TEXT, "messages", [ONE], []),
        (CompletionRequest, TEXT, "prediction", {"type": "content", "content": "x"}, None),
        (CompletionRequest, TEXT, "reasoning_effort", "high", "none"),
        (CompletionRequest, TEXT, "top_logprobs", 5, 0),
        (CompletionRequest, TEXT, "add_special_tokens", False, True),
        (CompletionRequest, TEXT, "instructions", "Answer in French.", ""),
        (ChatCompletionRequest, CHAT, "add_special_tokens", True, False),
        (ChatCompletionRequest, CHAT, "echo", True, False),
        (ChatCompletionRequest, CHAT, "best_of", 5, 1),
        (ChatCompletionRequest, CHAT, "system", "Answer in French.", ""),
        (ChatCompletionRequest, CHAT, "instructions", "Answer in French.", ""),
        (ChatCompletionRequest, CHAT, "text", {"format": {"type": "json_object"}}, {"format": {"type": "text"}}),
        (ChatCompletionRequest, CHAT, "output_config", {"format": {}}, {}),
        (ChatCompletionRequest, CHAT, "previous_response_id", "resp_1", None),
        *((model, base, *case) for model, base in OTHER_APIS for case in OF_CHAT_ALONE),
    ],
)
def test_fields_of_another_endpoint_pass_only_when_they_ask_for_nothing(
    model: Any, base: dict[str, Any], field: str, asks: Any, no_op: Any
) -> None:
    error = error_of(model, {**base, field: asks})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    for strict in (False, True):
        leniency = Leniency(strict)
        model.model_validate({**base, field: no_op}, context=leniency)
        assert not leniency.ignored


def test_completion_fields_that_are_not_supported() -> None:
    assert error_of(CompletionRequest, {**TEXT, "suffix": "s", "echo": True}).param == "suffix"
    assert error_of(CompletionRequest, {**TEXT, "best_of": 2}).param == "best_of"
    CompletionRequest.model_validate({**TEXT, "suffix": None, "best_of": 2, "n": 2})


@given(st.text(max_size=2000))
def test_any_unknown_field_is_named_in_a_body_that_can_be_sent(name: str) -> None:
    error = error_of(ChatCompletionRequest, {**CHAT, f"x{name}": 1}, strict=True)
    assert error.code == "unsupported_parameter"
    assert len(error.response().body) < 10_000


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (CompletionRequest, {**TEXT, "prompt": [-1] * 5000}, "prompt.0"),
        (CompletionRequest, {**TEXT, "prompt": [[1, 2], *[[-1]] * 100]}, "prompt.1.0"),
        (CompletionRequest, {**TEXT, "prompt": [[-1] * 5000]}, "prompt.0.0"),
        (CompletionRequest, {**TEXT, "stop_token_ids": [-1] * 5000}, "stop_token_ids.0"),
        (CompletionRequest, {**TEXT, "stop": [1] * 5000}, "stop.0"),
        (CompletionRequest, {**TEXT, "logit_bias": {str(i): 1000 for i in range(5000)}}, "logit_bias"),
        (CompletionRequest, {**TEXT, "metadata": {str(i): 1 for i in range(5000)}}, "metadata"),
        (CompletionRequest, {**TEXT, **{f"x{i}": 1 for i in range(5000)}}, "x64"),
        (ChatCompletionRequest, {**CHAT, "messages": [{**ONE, f"x{i}": 1} for i in range(100)]}, "messages.64.x64"),
        (ChatCompletionRequest, {**CHAT, "messages": [{}] * 2000}, "messages.0.role"),
        (
            ChatCompletionRequest,
            {**CHAT, "messages": [{"role": "user", "content": [1] * 2000}]},
            "messages.0.content.0",
        ),
        (ChatCompletionRequest, {**CHAT, "stream_options": {f"x{i}": 1 for i in range(5000)}}, "stream_options.x64"),
        (DetokenizeRequest, {"tokens": [-1] * 5000}, "tokens.0"),
        (DetokenizeRequest, {"tokens": [1], **{f"x{i}": 1 for i in range(5000)}}, "x0"),
    ],
)
def test_thousands_of_wrong_values_are_not_thousands_of_errors(model: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body, context=Leniency())
    assert caught.value.error_count() < 10
    assert error_of(model, body).param == param


def test_a_schema_too_long_for_the_engine_gets_no_further() -> None:
    schema = {"type": "integer", "description": "x" * 65_536}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = ChatCompletionRequest.model_validate({**CHAT, "response_format": wanted})
    with pytest.raises(ApiError, match="longer than") as caught:
        to_grammar(body)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


def test_a_parameter_of_the_path_is_named() -> None:
    error = {"type": "literal_error", "loc": ("path", "action"), "msg": "Input should be 'reset'", "input": "x"}
    assert validation_error([error], None).param == "action"


def test_text_parts_are_joined_and_developer_means_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatCompletionRequest.model_validate({**CHAT, "messages": [{"role": "developer", "content": parts}]})
    assert body.messages[0].for_template()["role"] == "system"
    assert body.messages[0].for_template()["content"] == "ab"


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
            Grammar("json_schema", json.dumps({"type": "integer"})),
        ),
    ],
)
def test_response_format_becomes_a_grammar(given_value: Any, expected: Grammar | None) -> None:
    body = ChatCompletionRequest.model_validate({**CHAT, "response_format": given_value})
    assert to_grammar(body) == expected


def test_every_sampling_parameter_reaches_the_engine() -> None:
    body = CompletionRequest.model_validate(
        {
            **TEXT, "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": -(2**63),
            "presence_penalty": 0.1, "frequency_penalty": -0.2, "repetition_penalty": 1.3,
            "logit_bias": {"3": -100}, "stop": "end", "stop_token_ids": [4], "ignore_eos": True, "min_tokens": 2,
        }
    )  # fmt: skip
    sampling = to_sampling_params(body, 9, SERVING, logprobs=2, prompt_logprobs=1)
    assert sampling.temperature == 0
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 7, 0.1)
    assert sampling.seed == -(2**63)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, -0.2, 1.3)
    assert sampling.logit_bias == {3: -100}
    assert (sampling.stop, sampling.stop_token_ids) == (("end",), (4,))
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.max_tokens) == (True, 2, 9)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (2, 1)


def test_null_means_the_default() -> None:
    fields = ["temperature", "top_p", "top_k", "seed", "stop", "n", "logit_bias", "stream", "response_format", "user"]
    body = CompletionRequest.model_validate({**TEXT, **dict.fromkeys(fields)})
    given_null = to_sampling_params(body, 5, SERVING, logprobs=None)
    assert (given_null.temperature, given_null.top_p, given_null.top_k, given_null.min_p) == (0.3, 0.4, 5, 0.6)
    assert (given_null.repetition_penalty, given_null.stop) == (1.5, ())
    assert 0 <= given_null.seed < 2**63


async def test_many_texts_that_are_long_together_do_not_stop_the_loop() -> None:
    threads: set[int] = set()

    class Spy:
        def least_tokens(self, text: str) -> int:
            return 0

        def encode(self, text: str) -> list[int]:
            threads.add(threading.get_ident())
            return [len(text)]

    info = SimpleNamespace(max_model_len=1000, vocab_size=5000)
    work = RequestWork(WorkShares(), "acme", 8 * 4000, asyncio.Event().wait)  # type: ignore[arg-type]  # a client that stays
    prompts = await work.run(tokenize_prompts, Spy(), ["x" * 4000] * 8, info)  # type: ignore[arg-type]
    assert [prompt.token_ids for prompt in prompts] == [[4000]] * 8
    assert threading.get_ident() not in threads


def test_a_gap_is_told_in_the_models_own_tokens() -> None:
    info = SimpleNamespace(max_model_len=1000, vocab_size=2 * VOCAB_SIZE)
    tokenizer = Tokenizer(tiny_tokenizer(), VOCAB_SIZE, None, (), None)
    for prompt in ("before", [1, 2]):
        with pytest.raises(ApiError) as refused:
            tokenize_prompts(tokenizer, prompt, info, suffix="after")  # type: ignore[arg-type]
        assert (refused.value.status, refused.value.param) == (400, "suffix")
    tokenizer.backend.add_special_tokens(["<fim_prefix>", "<fim_middle>", "<fim_suffix>"])
    [gap] = tokenize_prompts(tokenizer, "before", info, suffix="after")  # type: ignore[arg-type]
    assert tokenizer.decode(gap.token_ids, skip_special_tokens=False) == (
        "<fim_prefix>before<fim_suffix>after<fim_middle>"
    )


def test_parts_are_few_in_all_messages_together() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}] * 1024}
    assert ChatCompletionRequest.model_validate({**CHAT, "messages": [message] * 2})
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call] * 100}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "x"}] * 1024}
    for model, messages in (
        (ChatCompletionRequest, [message] * 3),
        (ChatCompletionRequest, [calls] * 21),
        (TokenizeRequest, [message] * 3),
        (MessagesRequest, [{"role": "user", "content": [result] * 3}]),
    ):
        error = error_of(model, {"model": "m", "max_tokens": 9, "messages": messages})
        assert (error.status, error.param, "2048 parts" in error.message) == (400, "messages", True)
    prediction = {"type": "content", "content": [{"type": "text", "text": "x"}] * 2049}
    assert "2048 entries" in error_of(ChatCompletionRequest, {**CHAT, "prediction": prediction}).message


def test_what_asks_for_nothing_goes_with_all() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for more in ({"tools": tools, "guided_json": None}, {"logprobs": False, "top_logprobs": 0}):
        assert ChatCompletionRequest.model_validate({**CHAT, **more})


def test_what_the_openai_client_sends_back_of_a_parsed_answer_is_accepted() -> None:
    answer = {"role": "assistant", "content": '{"a": 1}', "parsed": {"a": 1}, "refusal": None}
    body = ChatCompletionRequest.model_validate({**CHAT, "messages": [*CHAT["messages"], answer]})
    assert body.messages[1].for_template()["content"] == '{"a": 1}'


@pytest.mark.parametrize("depth", [900, 960, 965])
def test_a_schema_nested_too_deeply_is_the_clients_error(depth: int) -> None:
    """Whatever gives up on it first."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    response_format = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    body = CompletionRequest.model_validate({**TEXT, "response_format": response_format})
    with pytest.raises(ApiError) as caught:
        to_grammar(body)
    assert (caught.value.status, caught.value.param) == (400, "response_format")
