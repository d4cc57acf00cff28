"""The real ``openai`` client against the whole server with SmolLM2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionUserMessageParam

from tests.running_server import AT_ONCE, SMALL, RunningServer
from tests.tiny_models import make_directory

MODEL = "smollm2-135m"
QUESTION: ChatCompletionUserMessageParam = {
    "role": "user",
    "content": "What is the capital of France? Answer in one sentence.",
}


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", http_client=http)


def test_streamed_chat_equals_the_whole_answer(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": [QUESTION], "temperature": 0, "max_completion_tokens": 32}
    whole: ChatCompletion = client.chat.completions.create(**arguments)
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_prediction_is_taken_and_changes_nothing(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": [QUESTION], "temperature": 0, "max_completion_tokens": 32}
    whole: ChatCompletion = client.chat.completions.create(**arguments)
    text = whole.choices[0].message.content
    for content in (text, "Something else.", [{"type": "text", "text": text}]):
        predicted: Any = {"type": "content", "content": content}
        again: ChatCompletion = client.chat.completions.create(**arguments, prediction=predicted)
        assert again.choices[0].message.content == text
    with pytest.raises(openai.BadRequestError, match="prediction"):
        client.chat.completions.create(**arguments, prediction=predicted | {"content": 5})


def test_completion_stops_before_a_stop_string(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": "1, 2, 3, 4, 5,", "temperature": 0, "max_tokens": 24}
    free: str = client.completions.create(**arguments).choices[0].text
    assert "8, 9" in free
    stopped: CompletionChoice = client.completions.create(**arguments, stop="8, 9").choices[0]
    streamed: list[Completion] = list(client.completions.create(**arguments, stop="8, 9", stream=True))
    assert stopped.text == free[: free.index("8, 9")]
    assert stopped.finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.text


def test_the_same_seed_gives_the_same_choices(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        completion = client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=12, n=3, seed=seed, temperature=1
        )
        return [choice.text for choice in completion.choices]

    first = sample(1)
    assert len(set(first)) == 3
    assert sample(1) == first
    assert sample(2)[:2] == first[1:]  # choice i has seed + i
    assert sample(100) != first


def test_logprobs_of_the_chosen_tokens(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[QUESTION], temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="The capital of France is Paris", max_tokens=0, echo=True, logprobs=1, temperature=0
    ).choices[0]
    assert choice.text == "The capital of France is Paris"
    assert choice.logprobs is not None
    scores = choice.logprobs.token_logprobs or []
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])
    assert scores[-1] > -3  # the model knows


def test_structured_output_is_json_that_fits(client: openai.OpenAI) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[QUESTION],
        temperature=0,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"city", "people"}
    assert isinstance(value["people"], int)


@pytest.mark.parametrize(
    ("constraint", "matches"),
    [
        ({"structured_outputs": {"choice": ["Paris", "London\nEngland"]}}, "Paris|London\nEngland"),
        ({"guided_regex": r"[A-Z][a-z]{2,9}(, [A-Z][a-z]{2,9}){2}"}, r"[A-Z][a-z]{2,9}(, [A-Z][a-z]{2,9}){2}"),
        ({"structured_outputs": {"grammar": 'root ::= ("- " [a-z]{2,9} "\\n"){3}'}}, r"(- [a-z]{2,9}\n){3}"),
    ],
)
def test_output_has_the_form_that_vllms_fields_say_with_drafts_and_without(
    client: openai.OpenAI, constraint: dict[str, Any], matches: str
) -> None:
    texts = [
        client.chat.completions.create(
            model=MODEL,
            messages=[QUESTION],
            temperature=0,
            max_tokens=100,
            extra_body={**constraint, "num_speculative_tokens": num_drafts},
        )
        .choices[0]
        .message.content
        for num_drafts in (0, 8)
    ]
    assert texts[0] == texts[1]
    assert re.fullmatch(matches, texts[0] or ""), texts[0]


def test_a_schema_that_cannot_be_compiled_is_the_clients_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=MODEL,
            messages=[QUESTION],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-such-type"}}},
        )


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=[QUESTION])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model=MODEL, messages=[QUESTION], extra_body={"mirostat": 2})
    assert unsupported.value.param == "mirostat"


def test_a_server_starts_as_vllm_and_llama_cpp_do(tmp_path: Path) -> None:
    model = make_directory(tmp_path / "tiny").path
    options = ["--max-model-len", "48", "--served-model-name", "mine", "--api-key", "secret"]
    server = RunningServer(tmp_path / "log.jsonl", [str(model), *options, *SMALL, *AT_ONCE])
    try:
        server.wait_until_healthy()
        http = openai.DefaultHttpxClient(trust_env=False, timeout=60)
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="secret", http_client=http)
        answer = client.chat.completions.with_raw_response.create(
            model="mine",
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"}],
            max_tokens=32_000,
            user="Ann",
            store=True,
            extra_headers={"X-Session-Id": "ses_1"},
            extra_body={"chat_id": "5"},
        )
        usage = answer.parse().usage
        (card,) = client.models.list().data
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
    finally:
        server.stop()
    assert answer.headers["x-ignored-fields"] == "chat_id, store"
    assert usage is not None
    assert usage.total_tokens <= 48
    assert card.id == "mine"
    assert card.to_dict()["max_model_len"] == 48


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["The cat sleeps.", "A cat is sleeping.", "Interest rates rise by 2 %."]
    answer = client.embeddings.create(model=MODEL, input=texts)
    vectors = [entry.embedding for entry in answer.data]

    def likeness(first: int, second: int) -> float:
        return sum(a * b for a, b in zip(vectors[first], vectors[second], strict=True))

    assert [likeness(index, index) for index in range(3)] == [pytest.approx(1, abs=1e-5)] * 3
    assert likeness(0, 1) > likeness(0, 2)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 3
    [alone] = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data
    assert sum(a * b for a, b in zip(alone.embedding, vectors[0], strict=True)) == pytest.approx(1, abs=1e-2)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=MODEL, input=texts[0], dimensions=8)


def test_models_list(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
