"""Embeddings: what the engine makes of prompts, against ``transformers``, and how /v1/embeddings answers."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evospec.engine.messages import EngineOutput, EngineRequest, SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.prompt_embeddings import collect_embeddings, take_embedding
from evospec.engine.request import Request
from evospec.engine.step import ScheduledSequence
from tests.integration.running_api import Api
from tests.reference_logits import transformers_model
from tests.tiny_drafts import CLIENT, Engine, Setting, with_draft
from tests.tiny_models import VOCAB_SIZE

EMBEDDED = SamplingParams(max_tokens=1, seed=0, temperature=0, num_speculative_tokens=0, embedding=True)
WRITTEN = SamplingParams(max_tokens=60, seed=0, temperature=0, ignore_eos=True)


def prompt(length: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def requests_of(prompts: list[list[int]], sampling: SamplingParams, name: str) -> list[EngineRequest]:
    return [
        EngineRequest(request_id=f"{name} {number}", prompt_token_ids=tokens, sampling=sampling, tenant=name)
        for number, tokens in enumerate(prompts)
    ]


@pytest.mark.parametrize("drafts", [False, True])
def test_the_engine_makes_the_means_of_hidden_states(tiny_model: ModelFiles, tmp_path: Path, drafts: bool) -> None:
    """Of prompts in the prefix cache, in chunks, beside others that write, and after preemptions."""
    setting = Setting(prefix_caching=True, max_batched_tokens=40, num_blocks=24)
    engine = Engine(tiny_model, setting, with_draft(tiny_model, tmp_path) if drafts else None)
    prompts = [prompt(length) for length in (1, 16, 90, 250)]
    engine.generate(prompts, [EMBEDDED] * len(prompts), ["embeds"] * len(prompts))
    embeds = requests_of(prompts, EMBEDDED, "embeds")
    found: dict[str, EngineOutput] = {}
    for request in [*requests_of([prompt(60)] * 4, WRITTEN, "writes"), *embeds]:
        engine.core.add(CLIENT, request)
    while engine.core.stats().num_running + engine.core.stats().num_waiting:
        for output in engine.core.step()[0][CLIENT]:
            if output.request_id.startswith("embeds"):
                assert output.request_id not in found
                found[output.request_id] = output
            else:
                assert output.embedding is None
    assert engine.core.stats().preemptions
    reference = transformers_model(tiny_model)
    for request in embeds:
        output = found[request.request_id]
        with torch.inference_mode():
            hidden = reference(torch.tensor([request.prompt_token_ids]), output_hidden_states=True).hidden_states[-1]
        expected = torch.nn.functional.normalize(hidden[0].mean(0), dim=0)
        assert output.embedding is not None
        np.testing.assert_allclose(np.frombuffer(output.embedding, "<f4"), expected, atol=1e-5)
        assert (output.finish_reason, output.num_cached_tokens) == ("length", 0)


def test_an_embedding_does_not_tell_how_its_prompt_was_divided() -> None:
    """Which is by what else a step computes."""
    request = Request("r", b"", "tests", EMBEDDED, prompt(100))
    hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))

    def embedding(*borders: int) -> bytes | None:
        for start, end in pairwise((0, *borders, 100)):
            chunk = ScheduledSequence(request, start, request.prompt_token_ids[start:end], 0, 0, 0, array("i"))
            collect_embeddings([chunk], hidden[start:end])
        return take_embedding(request)

    assert embedding(1) == embedding(36, 64) == embedding(*range(10, 100, 10)) == embedding()


def of_prompt(request: EngineRequest) -> Iterable[EngineOutput]:
    """Its first token and its length as the embedding."""
    assert request.sampling == EMBEDDED
    values = array("f", [request.prompt_token_ids[0], len(request.prompt_token_ids) + 0.1])
    yield EngineOutput(request_id=request.request_id, token_ids=[5], embedding=values.tobytes(), finish_reason="length")


async def embed(api: Api, **body: Any) -> Any:
    response = await api.client.post("/v1/embeddings", json={"model": "tiny"} | body)
    return response.status_code, json.loads(response.text)


async def test_embeddings_are_in_the_order_of_inputs(serve: Any) -> None:
    async with serve(of_prompt) as api:
        status, answer = await embed(api, input=[[7, 8, 9], [3], [4, 4]], user="Ann")
        assert status == 200
        vectors = [entry.pop("embedding") for entry in answer["data"]]
        assert vectors == [pytest.approx(values) for values in ([7, 3.1], [3, 1.1], [4, 2.1])]
        assert answer == {
            "object": "list",
            "data": [{"object": "embedding", "index": index} for index in range(3)],
            "model": "tiny",
            "usage": {"prompt_tokens": 6, "total_tokens": 6},
        }
        text = "The dog"
        [of_text] = (await embed(api, input=text, encoding_format="base64"))[1]["data"]
        [of_tokens] = (await embed(api, input=api.tokenizer.encode(text)))[1]["data"]
        assert array("f", base64.b64decode(of_text["embedding"])).tolist() == of_tokens["embedding"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": "x" * 10_000}, "input"),
        ({"input": [3] * 64}, "input"),
        ({"input": [VOCAB_SIZE]}, "input"),
        ({"input": 5}, "input"),
        ({}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "model": "other"}, "model"),
    ],
)
async def test_what_cannot_be_embedded_is_named(serve: Any, body: dict[str, Any], named: str) -> None:
    async with serve(of_prompt) as api:
        status, answer = await embed(api, **body)
        assert status == (404 if named == "model" else 400)
        assert answer["error"]["param"].split(".")[0] == named
        assert not api.engine.requests
