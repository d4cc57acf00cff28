"""The metrics once more under vLLM's names and labels, for its dashboards, load generator and routers.

They are made of ours when somebody asks: the tenants together, labelled ``model_name`` and ``engine``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_COUNTERS: Mapping[str, tuple[str, ...]] = {
    "prompt_tokens": (),
    "generation_tokens": (),
    "request_success": ("finished_reason",),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "spec_decode_num_drafts": (),
    "spec_decode_num_draft_tokens": (),
    "spec_decode_num_accepted_tokens": (),
    "spec_decode_num_accepted_tokens_per_pos": ("position",),
}
"""Those of the same name, with the labels that stay."""
_GAUGES = ("num_requests_running", "num_requests_waiting")
_HISTOGRAMS = {
    **{
        name: name
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
        )
    },
    "iteration_tokens_total": "engine_step_tokens",
}
"""vLLM's name, and ours."""
_LABELS = ("model_name", "engine")
_ENGINE = "0"

Sums = dict[tuple[str, ...], float]
"""By the values of some labels."""


class VllmMetrics(Collector):
    """A view of ``registry``; ``model``: the value of ``model_name``."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry, self._model = registry, model

    def describe(self) -> list[Metric]:
        """Nothing: registering this must not collect it."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        ours = {metric.name.removeprefix("evospec:"): metric for metric in self._registry.collect()}
        of_all = (self._model, _ENGINE)
        for name, labels in _COUNTERS.items():
            family = CounterMetricFamily(f"vllm:{name}", ours[name].documentation, labels=(*_LABELS, *labels))
            for values, value in (_sums(ours[name], "_total", labels) or ({} if labels else {(): 0.0})).items():
                family.add_metric((*of_all, *values), value)
            yield family
        for name in _GAUGES:
            yield self._gauge(name, ours[name].documentation, _sum(ours[name], ""))
        used, total = (_sum(ours[f"kv_blocks_{which}"], "") for which in ("used", "total"))
        yield self._gauge("kv_cache_usage_perc", "Used KV cache blocks, from 0 to 1.", used / total if total else 0.0)
        preemptions = CounterMetricFamily("vllm:num_preemptions", ours["preemptions"].documentation, labels=_LABELS)
        preemptions.add_metric(of_all, _sum(ours["preemptions"], "_total"))
        yield preemptions
        for name, own in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", ours[own].documentation, labels=_LABELS)
            buckets = [(bound, count) for (bound,), count in _sums(ours[own], "_bucket", ("le",)).items()]
            if buckets:
                histogram.add_metric(of_all, buckets, _sum(ours[own], "_sum"))
            yield histogram

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", about, labels=_LABELS)
        gauge.add_metric((self._model, _ENGINE), value)
        return gauge


def _sums(metric: Metric, suffix: str, labels: Sequence[str]) -> Sums:
    """The samples with a suffix, summed over all labels but some."""
    sums: Sums = defaultdict(float)
    for sample in metric.samples:
        if sample.name == metric.name + suffix:
            sums[tuple(sample.labels[label] for label in labels)] += sample.value
    return sums


def _sum(metric: Metric, suffix: str) -> float:
    return sum(_sums(metric, suffix, ()).values())
