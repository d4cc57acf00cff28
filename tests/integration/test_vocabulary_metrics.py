"""What the API tells of draft vocabularies: the counts that engines send, by tenant and domain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from evospec.engine.messages import EngineOutput, EngineRequest, EngineStats, StepTimings, VocabularyCounts

COUNTS = VocabularyCounts(
    tail_tokens=40, verified_tokens=10, covered_tokens=8, events=2, insertions={"target": 5, "graph": 3},
    hits={"target": 4},
)  # fmt: skip
STATS = EngineStats(
    num_waiting=0, num_running=1, blocks_used=0, blocks_total=8, prefix_query_tokens=0, prefix_hit_tokens=0,
    preemptions=0, vocabularies_used=3, vocabularies_total=64, snapshots_refused=1,
)  # fmt: skip


def with_vocabulary(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[100])
    yield EngineOutput(request_id=request.request_id, token_ids=[100], finish_reason="length", vocabulary=COUNTS)


def without_vocabulary(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[100], finish_reason="length")


def samples(text: str) -> dict[tuple[str, str, str], float]:
    """Values of the vocabularies' metrics but buckets, by name, domain and source."""
    return {
        (sample.name.removeprefix("evospec:"), sample.labels.get("domain", "-"), sample.labels.get("source", "-")):
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("evospec:vocab") and not sample.name.endswith(("_bucket", "_created"))
    }  # fmt: skip


async def test_each_sequence_counts_once_with_its_tenant_and_domain(serve: Any) -> None:
    async with serve(with_vocabulary, draft="tiny") as api:
        session_id = (await api.client.post("/v1/sessions", json={"domain": "law"})).json()["id"]
        await api.post("/v1/completions", n=2, session_id=session_id)
        await api.post("/v1/completions")
        text = (await api.client.get("/metrics")).text
    seen = samples(text)
    for domain, times in (("law", 2), ("", 1)):
        assert {key: value for key, value in seen.items() if key[1] == domain} == {
            ("vocab_tail_tokens_sum", domain, "-"): 40 * times,
            ("vocab_tail_tokens_count", domain, "-"): times,
            ("vocab_verified_tokens_total", domain, "-"): 10 * times,
            ("vocab_covered_tokens_total", domain, "-"): 8 * times,
            ("vocab_events_total", domain, "-"): 2 * times,
            ("vocab_insertions_total", domain, "target"): 5 * times,
            ("vocab_insertions_total", domain, "graph"): 3 * times,
            ("vocab_hits_total", domain, "target"): 4 * times,
        }
    assert 'evospec:vocab_events_total{domain="law",model="tiny",tenant="default"} 4.0' in text


async def test_no_counts_of_sequences_without_a_vocabulary(serve: Any) -> None:
    async with serve(without_vocabulary) as api:
        await api.post("/v1/completions")
        await api.engine.send(stats=STATS, steps=[StepTimings(0.1, 0.1, 0.1, 0.1, 1, 1)])
        await api.until_get("/metrics", lambda response: "step_tokens_count 1.0" in response.text)
        text = (await api.client.get("/metrics")).text  # metrics are written one by one
    assert {domain for _, domain, _ in samples(text)} == {"-"}
    assert samples(text)["vocab_step_seconds_count", "-", "-"] == 0


async def test_what_the_engine_says_of_all_vocabularies(serve: Any) -> None:
    async with serve(without_vocabulary) as api:
        await api.engine.send(stats=STATS)  # counters say how many since the start: sent twice, they count once
        steps = [StepTimings(0.1, 0.1, 0.1, 0.1, 1, 1, 0.5, vocabulary=0.25)]
        await api.post("/v1/completions")
        await api.engine.send(stats=STATS, steps=steps)
        await api.until_get("/metrics", lambda response: "step_tokens_count 1.0" in response.text)
        text = (await api.client.get("/metrics")).text  # metrics are written one by one
    assert samples(text) == {
        ("vocabularies_used", "-", "-"): 3,
        ("vocabularies_total", "-", "-"): 64,
        ("vocab_snapshots_refused_total", "-", "-"): 1,
        ("vocab_step_seconds_sum", "-", "-"): 0.25,
        ("vocab_step_seconds_count", "-", "-"): 1,
    }
    assert 'evospec:engine_step_seconds_sum{part="draft"} 0.5' in text
