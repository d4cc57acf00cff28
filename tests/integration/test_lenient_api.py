"""What clients of other servers send, over HTTP: what is ignored is named, what is too much is capped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from tests.integration.running_api import running_api

PATHS = ["/v1/completions", "/v1/chat/completions"]


def one_token(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300], finish_reason="length")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_ignored_fields_are_named_in_a_header(serve: Any, path: str, stream: bool) -> None:
    async with serve(one_token) as api:
        plain = await api.post(path, stream=stream)
        answer = await api.post(path, stream=stream, chat_id="5", cache_salt="s", **{"no\nheader": 1})
    assert [plain.status_code, answer.status_code] == [200, 200]
    assert "x-ignored-fields" not in plain.headers
    assert answer.headers["x-ignored-fields"] == "chat_id, cache_salt"


@pytest.mark.parametrize("path", PATHS)
async def test_a_strict_server_refuses_them(serve: Any, path: str) -> None:
    async with serve(one_token, "--strict") as api:
        answer = await api.post(path, chat_id="5")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_id")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (PATHS[0], {"prompt": [5] * 60}, "max_tokens"),
        (PATHS[0], {"prompt": [5] * 60}, "max_completion_tokens"),
        (PATHS[1], {}, "max_tokens"),
        (PATHS[1], {}, "max_completion_tokens"),
    ],
)
async def test_max_tokens_beyond_the_context_are_as_many_as_fit(
    serve: Any, path: str, body: dict[str, Any], field: str
) -> None:
    async with serve(one_token) as api:
        answer = await api.post(path, **body, **{field: 32_000})
        request = api.engine.requests[-1]
    async with serve(one_token, "--strict") as api:
        refused = await api.post(path, **body, **{field: 32_000})
    assert answer.status_code == 200
    assert len(request.prompt_token_ids) + request.sampling.max_tokens == 64
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("path", PATHS)
async def test_the_newer_name_of_max_tokens_is_as_good(serve: Any, path: str) -> None:
    async with serve(one_token) as api:
        answer = await api.post(path, max_completion_tokens=7)
    assert (answer.status_code, answer.headers.get("x-ignored-fields")) == (200, None)
    assert [request.sampling.max_tokens for request in api.engine.requests] == [7]


async def test_template_variables_change_the_prompt(
    tiny_model: ModelFiles, tokenizer: Tokenizer, valkey_url: str, tmp_path: Any
) -> None:
    model = ModelFiles("tiny", tmp_path / "tiny", "safetensors")
    model.path.mkdir()
    for file in tiny_model.path.iterdir():
        (model.path / file.name).symlink_to(file)
    (model.path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}{{ reasoning_effort }}{{ 1 // divisor }}"
    )
    asked = {"messages": [{"role": "user", "content": "Hi", "name": "Ann"}], "reasoning_effort": "low"}
    async with running_api(one_token, model, tokenizer, valkey_url, tmp_path) as api:
        answer = await api.post(PATHS[1], **asked, chat_template_kwargs={"divisor": 1})
        prompt = tokenizer.decode(api.engine.requests[-1].prompt_token_ids)
        same = {"messages": asked["messages"], "chat_template_kwargs": {"divisor": 1}}
        tokens = (await api.client.post("/tokenize", json=same)).json()["tokens"]
        refused = await api.post(PATHS[1], **asked, chat_template_kwargs={"divisor": 0})
    assert answer.status_code == 200
    assert prompt == "Ann:Hilow1"
    assert tokenizer.decode(tokens) == "Ann:Hi1"
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
