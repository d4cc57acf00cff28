"""What the API tells of speculation: the cap a request may set, its own figures, counters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from evospec.engine.messages import EngineOutput, EngineRequest

# (draft tokens, accepted ones) of the four steps that make 1 + 1 + 3 + 3 tokens; the first is the prompt's.
STEPS = [(0, 0), (3, 0), (3, 2), (2, 2)]
EXPECTED = {
    "mean_acceptance_length": pytest.approx(1 + 4 / 3),
    "draft_acceptance_rate": 0.5,
    "acceptance_histogram": [1, 0, 2, 0, 0],
    "num_spec_steps": 3,
    "num_accepted_draft_tokens": 4,
    "num_draft_tokens": 8,
    "num_spec_tokens": 4,
    "draft_version": 7,
}


def speculating(request: EngineRequest) -> Iterable[EngineOutput]:
    for number, (drafted, accepted) in enumerate(STEPS):
        yield EngineOutput(
            request_id=request.request_id,
            token_ids=[100] * (1 + accepted),
            num_draft_tokens=drafted,
            num_accepted_tokens=accepted,
            draft_version=7,
            copied=number == 0,
            finish_reason="length" if number == len(STEPS) - 1 else None,
        )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_response_says_how_its_drafts_fared(serve: Any, path: str) -> None:
    async with serve(speculating, draft="tiny") as api:
        whole = (await api.post(path)).json()
        events = await api.events(path, stream_options={"include_usage": True})
        without_usage = await api.events(path)
    assert whole["metrics"] == {"speculative_decoding": EXPECTED}
    assert whole["usage"]["completion_tokens"] == 8
    assert events[-2]["metrics"] == whole["metrics"]
    assert events[-2]["choices"] == []
    assert not any("metrics" in event for event in [*events[:-2], *without_usage[:-1]])


async def test_usage_says_what_became_of_a_prediction(serve: Any) -> None:
    def predicted(request: EngineRequest) -> Iterable[EngineOutput]:
        yield EngineOutput(
            request_id=request.request_id,
            token_ids=[100] * 4,
            num_draft_tokens=4,
            num_accepted_tokens=3,
            num_predicted_tokens=min(3, len(request.prediction_token_ids)),
            finish_reason="length",
        )

    async with serve(predicted, draft="tiny") as api:
        count = len(api.tokenizer.encode("The dog and the cat", add_special_tokens=False))
        prediction = {"type": "content", "content": "The dog and the cat"}
        whole = (await api.post("/v1/chat/completions", prediction=prediction, n=2)).json()["usage"]
        without = (await api.post("/v1/chat/completions")).json()["usage"]
    assert whole["completion_tokens_details"] == {
        "accepted_prediction_tokens": 6,
        "rejected_prediction_tokens": 2 * count - 6,
    }
    assert "completion_tokens_details" not in without


async def test_no_figures_without_a_draft_or_for_several_sequences(serve: Any) -> None:
    async with serve(speculating) as api:
        assert "metrics" not in (await api.post("/v1/completions")).json()
    async with serve(speculating, draft="tiny") as api:
        assert "metrics" not in (await api.post("/v1/completions", n=2)).json()
        assert "metrics" not in (await api.post("/v1/completions", prompt=["a", "b"])).json()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_cap_reaches_the_engine(serve: Any, path: str) -> None:
    def idle(request: EngineRequest) -> Iterable[EngineOutput]:
        yield EngineOutput(request_id=request.request_id, token_ids=[100], finish_reason="length")

    async with serve(idle, draft="tiny") as api:
        bodies = [(await api.post(path, num_speculative_tokens=cap)).json() for cap in (None, 0, 3, 8)]
        caps = [request.sampling.num_speculative_tokens for request in api.engine.requests]
    assert caps == [None, 0, 3, 8]
    figures = [body["metrics"]["speculative_decoding"] for body in bodies]
    assert [figure["num_spec_tokens"] for figure in figures] == [4, 0, 3, 4]
    assert [len(figure["acceptance_histogram"]) for figure in figures] == [5, 1, 4, 5]
    assert all(figure["mean_acceptance_length"] == 1 and figure["draft_acceptance_rate"] == 0 for figure in figures)


async def test_counters_are_vllms_with_tenant_and_domain(serve: Any) -> None:
    async with serve(speculating, draft="tiny draft") as api:
        await api.post("/v1/completions", n=2)
        text = (await api.client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    drafting = [s for s in samples if s.name.startswith("evospec:spec_decode") and s.name.endswith("_total")]
    counted = {
        (s.name.removeprefix("evospec:spec_decode_num_"), s.labels.pop("position", None)): s.value for s in drafting
    }
    expected: dict[tuple[str, str | None], float] = {
        ("drafts_total", None): 6,
        ("draft_tokens_total", None): 16,
        ("accepted_tokens_total", None): 8,
        ("copied_tokens_total", None): 2 * STEPS[0][0],
        ("accepted_copied_tokens_total", None): 2 * STEPS[0][1],
        **{("draft_tokens_per_pos_total", position): value for position, value in [("0", 6), ("1", 6), ("2", 4)]},
        **{("accepted_tokens_per_pos_total", position): value for position, value in [("0", 4), ("1", 4), ("2", 0)]},
    }
    assert counted == expected
    assert all(s.labels == {"model": "tiny", "tenant": "default", "domain": ""} for s in drafting)
    info = next(sample.labels for sample in samples if sample.name == "evospec:engine_info")
    assert info == {"dtype": "float32", "attention_backend": "none", "draft": "tiny draft"}
    assert "evospec:draft_bytes 512.0" in text.splitlines()


async def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(serve: Any, monkeypatch: Any) -> None:
    async with serve(speculating) as api:
        too_long = next("a" * n for n in range(10**6) if api.tokenizer.least_tokens("a" * n) > 64)
        monkeypatch.setattr(type(api.tokenizer), "encode", None)  # a call would be a 500
        refused = [
            await api.post("/v1/completions", prompt="a" * 4_000_000),
            await api.post("/v1/completions", prompt=["a", too_long]),
            await api.post("/v1/chat/completions", messages=[{"role": "user", "content": too_long}]),
        ]
    errors = [response.json()["error"] for response in refused]
    assert [response.status_code for response in refused] == [400] * 3
    assert [error["param"] for error in errors] == ["prompt", "prompt", "messages"]
    assert {error["code"] for error in errors} == {"context_length_exceeded"}
    assert all("64 tokens" in error["message"] for error in errors)
