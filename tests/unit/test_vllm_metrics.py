"""Our metrics under vLLM's names."""

from __future__ import annotations

import contextlib
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from evospec.engine.messages import EngineStats
from evospec.server.metrics import Metrics


def rendered() -> str:
    metrics = Metrics("m")
    for tenant, domain in (("a", ""), ("a", "law"), ("b", "")):
        own = metrics.for_tenant(tenant, domain)
        own.prompt_tokens.inc(10)
        own.generation_tokens.inc(5)
        own.observe_draft(4, 2, copied=False)
        own.observe_draft(20, 20, copied=True)
        own.observe("ttft", 0.02)
        own.finished["stop"].inc()
        own.observe("prompt_tokens", 10)
        own.observe("most_generation_tokens", 5)
    stats = EngineStats(
        num_waiting=0, num_running=2, blocks_used=1, blocks_total=4, prefix_query_tokens=0, prefix_hit_tokens=0,
        preemptions=0,
    )  # fmt: skip
    metrics.engine._observe_stats(stats)
    return metrics.render().decode()


def test_tenants_are_summed_under_vllms_labels() -> None:
    families = {family.name: family for family in text_string_to_metric_families(rendered())}
    labels = {"model_name": "m", "engine": "0"}

    def value(name: str, **more: str) -> float:
        samples = [sample for family in families.values() for sample in family.samples if sample.name == name]
        (found,) = [sample.value for sample in samples if sample.labels == labels | more]
        return float(found)

    assert value("vllm:prompt_tokens_total") == 30
    assert value("vllm:generation_tokens_total") == 15
    assert value("vllm:num_requests_running") == 2
    assert value("vllm:kv_cache_usage_perc") == 0.25
    assert value("vllm:request_success_total", finished_reason="stop") == 3
    assert value("vllm:request_success_total", finished_reason="length") == 0
    assert value("vllm:num_preemptions_total") == 0
    assert value("vllm:time_to_first_token_seconds_count") == 3
    assert value("vllm:time_to_first_token_seconds_bucket", le="0.01") == 0
    assert value("vllm:time_to_first_token_seconds_bucket", le="0.025") == 3
    assert value("vllm:time_to_first_token_seconds_bucket", le="+Inf") == 3
    assert value("vllm:request_prompt_tokens_sum") == 30
    assert value("vllm:request_max_num_generation_tokens_sum") == 15
    assert value("vllm:spec_decode_num_accepted_tokens_per_pos_total", position="1") == 6
    assert value("vllm:spec_decode_num_accepted_tokens_per_pos_total", position="2") == 3


def test_endpoint_pickers_find_their_gauges() -> None:
    """The model server protocol of the Gateway API inference extension; its picker reads one series of each."""
    families = {family.name: family for family in text_string_to_metric_families(rendered())}
    names = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
    gauges = [families[f"vllm:{name}"] for name in names]
    assert [(gauge.type, len(gauge.samples)) for gauge in gauges] == [("gauge", 1)] * 3
    assert 0 < gauges[-1].samples[0].value < 1


def test_vllms_load_generator_reads_what_was_drafted() -> None:
    """As ``vllm bench serve`` reads /metrics, by parts of names; it sums what it finds."""
    found: Counter[str] = Counter()
    by_position: Counter[int] = Counter()
    for line in rendered().splitlines():
        if not line.startswith("vllm:spec_decode"):
            continue
        with contextlib.suppress(ValueError):
            value = int(float(line.split()[-1]))
            if "num_drafts" in line:
                found["drafts"] += value
            elif "num_draft_tokens" in line:
                found["draft_tokens"] += value
            elif "num_accepted_tokens_per_pos" in line:
                start = line.index('position="') + len('position="')
                by_position[int(line[start : line.index('"', start)])] += value
            elif "num_accepted_tokens" in line:
                found["accepted_tokens"] += value
    assert found == {"drafts": 6, "draft_tokens": 72, "accepted_tokens": 66}
    assert by_position[0] == 6
    assert by_position[7] == 3


def test_before_the_first_request_there_is_something_to_show() -> None:
    assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 0.0' in Metrics("m").render().decode()
